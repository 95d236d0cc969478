"""The libraries we compare with, one function each; conftest.py runs them, under any NumPy.

    python peers.py FUNCTION FOLDER

FOLDER holds the arguments: ``NAME.npy``, ``NAME.npz`` (sparse) and ``options.json``. A function
loads its library, does what a user does once (such as an index), and returns the function to time.
Each line of standard input is ``run`` or ``save``, and the answer is ``done``; ``save`` writes the
last result to ``result.npz``. If a library is missing the answer is ``missing`` and the reason.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

Run = Callable[[], dict[str, Any]]


def pecos_clusters(x: Any, leaf: int, threads: int) -> Run:
    """Balanced spherical 2-means tree of PECOS, with leaves of at most `leaf` rows."""
    from pecos.xmc.base import HierarchicalKMeans

    options = HierarchicalKMeans.TrainParams(
        nr_splits=2, max_leaf_size=leaf, spherical=True, threads=threads, seed=0
    )

    def run() -> dict[str, Any]:
        leaves = HierarchicalKMeans.gen(x, train_params=options)[-1].tocsc()
        return {"order": leaves.indices, "offsets": leaves.indptr}

    return run


def sklearn_clusters(x: Any, n_clusters: int, threads: int) -> Run:
    """Bisecting 2-means of scikit-learn, largest cluster first; sizes are not balanced."""
    from sklearn.cluster import BisectingKMeans

    model = BisectingKMeans(n_clusters, random_state=0, bisecting_strategy="largest_cluster")

    def run() -> dict[str, Any]:
        assignment = model.fit_predict(x)
        counts = np.bincount(assignment, minlength=n_clusters)
        return {
            "order": np.argsort(assignment, kind="stable"),
            "offsets": np.append(0, np.cumsum(counts)),
        }

    return run


def faiss_clusters(x: Any, n_clusters: int, kind: str, threads: int) -> Run:
    """k-means of faiss with its own 25 rounds, `kind` Kmeans or SuperKmeans; any sizes."""
    import faiss

    faiss.omp_set_num_threads(threads)

    def run() -> dict[str, Any]:
        model = getattr(faiss, kind)(x.shape[1], n_clusters, niter=25)
        model.train(x)
        return {"centres": np.asarray(model.centroids, np.float32).reshape(n_clusters, -1)}

    return run


def faiss_topk(queries: Any, items: Any, k: int, threads: int) -> Run:
    """Exact search by inner product, faiss IndexFlatIP."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    return lambda: dict(zip(("scores", "ids"), index.search(queries, k), strict=True))


def numpy_topk(queries: Any, items: Any, k: int, threads: int) -> Run:
    """Exact search by inner product: a product by NumPy's BLAS and a partition, ids in no order."""
    import numpy as np

    def run() -> dict[str, Any]:
        scores = items @ queries[0] if len(queries) == 1 else queries @ items.T
        return {"ids": np.argpartition(scores.reshape(len(queries), -1), -k)[:, -k:]}

    return run


def numpy_product(queries: Any, items: Any, threads: int) -> Run:
    """The product of such a search alone: a limit rather than a peer."""

    def run() -> dict[str, Any]:
        scores = items @ queries[0] if len(queries) == 1 else queries @ items.T
        return {"last": scores.reshape(-1)[-1:]}

    return run


def sklearn_topk(queries: Any, items: Any, k: int, threads: int) -> Run:
    """Exact search by cosine, scikit-learn NearestNeighbors by brute force."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine", n_jobs=threads)
    index.fit(items)

    def run() -> dict[str, Any]:
        distances, ids = index.kneighbors(queries)
        return {"scores": 1 - distances, "ids": ids}

    return run


def torch_topk(queries: Any, items: Any, k: int, dtype: str, block: int, threads: int) -> Run:
    """Exact search by inner product: torch matmul and topk of `block` queries at a time."""
    import torch

    torch.set_num_threads(threads)
    queries, items = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (queries, items))

    def run() -> dict[str, Any]:
        found = [(part @ items.T).topk(k) for part in queries.split(block)]
        return {
            "scores": torch.cat([part.values for part in found]).float().numpy(),
            "ids": torch.cat([part.indices for part in found]).numpy(),
        }

    return run


def torch_product(queries: Any, items: Any, dtype: str, block: int, threads: int) -> Run:
    """The matrix product of a search without the selection: a limit rather than a peer."""
    import torch

    torch.set_num_threads(threads)
    queries, items = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (queries, items))

    def run() -> dict[str, Any]:
        for part in queries.split(block):
            product = part @ items.T
        return {"last": product[-1, -1:].float().numpy()}

    return run


def hnswlib_build(items: Any, m: int, ef: int, threads: int) -> Run:
    """Building a graph index; its search is `hnswlib_topk`."""
    hnswlib_index(items[:1], m, ef, threads)

    def run() -> dict[str, Any]:
        return {"count": np.array(hnswlib_index(items, m, ef, threads).get_current_count())}

    return run


def hnswlib_topk(
    queries: Any, items: Any, k: int, m: int, ef: int, search_ef: int, threads: int
) -> Run:
    """Approximate search by inner product in a graph index that is already built."""
    index = hnswlib_index(items, m, ef, threads)
    index.set_ef(search_ef)

    def run() -> dict[str, Any]:
        ids, distances = index.knn_query(queries, k, num_threads=threads)
        return {"scores": 1 - distances, "ids": ids}

    return run


def hnswlib_index(items: Any, m: int, ef: int, threads: int) -> Any:
    """An index of all items."""
    import hnswlib

    index = hnswlib.Index("ip", items.shape[1])
    index.init_index(len(items), ef_construction=ef, M=m, random_seed=0)
    index.add_items(items, num_threads=threads)
    return index


def scipy_positives(labels: Any, rows: Any, columns: Any, threads: int) -> Run:
    """The known positives of a batch, by slicing; they stay sparse. SciPy has one thread."""
    return lambda: csr_arrays(labels[rows][:, columns])


def napkinxc_precision(predictions: Any, truth: Any, k: int, threads: int) -> Run:
    """P@1 to P@k by napkinXC; the lists of ids it takes are sorted before. It has one thread."""
    from napkinxc.metrics import precision_at_k

    ranked = [row.indices[np.argsort(-row.data, kind="stable")[:k]].tolist() for row in predictions]
    positives = [row.indices.tolist() for row in truth]
    return lambda: {"P": precision_at_k(positives, ranked, k=k)}


def sparse_dot_topn_sparse_topk(queries: Any, items: Any, k: int, threads: int) -> Run:
    """The best entries of a sparse product by sparse_dot_topn."""
    from sparse_dot_topn import sp_matmul_topn

    columns = items.T.tocsr()

    def run() -> dict[str, Any]:
        return csr_arrays(sp_matmul_topn(queries, columns, top_n=k, n_threads=threads))

    return run


def pecos_sparse_topk(queries: Any, items: Any, k: int, threads: int) -> Run:
    """The sparse product of PECOS, 64 queries at a time, without the selection."""
    from pecos.core import clib

    columns = sp.csr_matrix(items.T)

    def run() -> dict[str, Any]:
        for first in range(0, queries.shape[0], 64):
            product = clib.sparse_matmul(queries[first : first + 64], columns, threads=threads)
        return {"last": product.data[-1:]}

    return run


def sklearn_sparse_topk(queries: Any, items: Any, k: int, threads: int) -> Run:
    """Exact search by cosine, scikit-learn NearestNeighbors by brute force."""
    return sklearn_topk(queries, items, k, threads)


def pecos_xr_linear(x: Any, y: Any, x_test: Any, k: int, threads: int) -> Run:
    """Predictions of linear trees: labels are clustered by their points."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    def run() -> dict[str, Any]:
        tree = Indexer.gen(LabelEmbeddingFactory.create(y, x, method="pifa"), threads=threads)
        model = XLinearModel.train(x, y, C=tree, threads=threads, negative_sampling_scheme="tfn")
        return csr_arrays(model.predict(x_test, only_topk=k, beam_size=20, threads=threads).tocsr())

    return run


def sklearn_linear_svc(x: Any, y: Any, x_test: Any, k: int, threads: int) -> Run:
    """Predictions of support vector machines, one a label against all points, by liblinear."""
    from joblib import Parallel, delayed
    from sklearn.svm import LinearSVC

    columns = y.tocsc()
    unknown = np.diff(columns.indptr) == 0

    def weights(label: int) -> Any:
        has = np.zeros(x.shape[0], int)
        has[columns.indices[columns.indptr[label] : columns.indptr[label + 1]]] = 1
        if unknown[label]:
            return sp.csr_matrix((1, x.shape[1]))
        svm = LinearSVC(C=0.5, tol=0.1, dual=True, fit_intercept=False, random_state=0)
        return sp.csr_matrix(svm.fit(x, has).coef_)

    def run() -> dict[str, Any]:
        rows = Parallel(threads, prefer="threads")(
            delayed(weights)(label) for label in range(y.shape[1])
        )
        w = sp.vstack(rows, format="csr").T.tocsr()
        found = []
        for first in range(0, x_test.shape[0], 256):
            scores = (x_test[first : first + 256] @ w).toarray()
            scores[:, unknown] = -100  # 0 would be above most of the others
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            found.append((np.take_along_axis(scores, best, 1) + 1e6, best))  # all are stored
        values, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
        offsets = np.arange(0, values.size + 1, values.shape[1])
        return csr_arrays(sp.csr_matrix((values.ravel(), ids.ravel(), offsets)))

    return run


def csr_arrays(matrix: Any) -> dict[str, Any]:
    """The arrays of a CSR matrix with sorted indices, by name."""
    matrix.sort_indices()
    return {"data": matrix.data, "indices": matrix.indices, "offsets": matrix.indptr}


def main(name: str, folder: Path) -> None:
    """Load the arguments, then answer the requests."""
    # Libraries print: keep that apart from the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    arguments = json.loads((folder / "options.json").read_text(encoding="utf8"))
    arguments |= {file.stem: np.load(file) for file in folder.glob("*.npy")}
    arguments |= {file.stem: sp.load_npz(file) for file in folder.glob("*.npz")}
    try:
        run = globals()[name](**arguments)
    except ModuleNotFoundError as error:
        print(f"missing {error}", file=answers)
        return
    print("done", file=answers)
    for line in sys.stdin:
        if line.strip() == "run":
            result = run()
        else:
            np.savez(folder / "result.npz", **result)
        print("done", file=answers)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
