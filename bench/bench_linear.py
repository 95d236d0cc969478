"""Linear classifiers of sparse rows, beside scikit-learn's and PECOS' linear trees.

    pytest bench/bench_linear.py --peers PYTHON --texts FOLDER

FOLDER is a data set with test points. A run trains on TF-IDF of words and pairs of words, and
predicts the labels of the test points. Without FOLDER the texts are drawn at random.
"""

import numpy as np
import pytest
import scipy.sparse as sp

import ngame
from ngame.prediction.lexical import Lexical

K = 100
NEIGHBOURS = 100


def drawn_texts(rng, count, labels):
    """Texts of a label's own words and of common ones."""
    own = rng.integers(0, labels, count)
    words = rng.integers(0, 5, (count, 4))
    common = rng.integers(0, 500, (count, 8))
    texts = [
        " ".join([*(f"l{label}w{word}" for word in few), *(f"c{word}" for word in many)])
        for label, few, many in zip(own, words, common, strict=True)
    ]
    return texts, sp.csr_matrix(
        (np.ones(count, np.float32), (np.arange(count), own)), (count, labels)
    )


@pytest.fixture(scope="module")
def case(request, quick):
    """TF-IDF rows of points and test points, and their labels."""
    folder = request.config.getoption("texts")
    if folder is None:
        rng = np.random.default_rng(0)
        count, labels = (600, 40) if quick else (20_000, 1000)
        texts, truth = drawn_texts(rng, count + count // 10, labels)
        lexical = Lexical.fit(texts[:count], [f"l{label}" for label in range(labels)])
        return lexical, truth[:count], lexical.tfidf(texts[count:]), truth[count:]
    data = ngame.load_dataset(folder)
    lexical = Lexical.fit(data.train_texts, data.label_texts)
    labels, truth = (
        sp.csr_matrix(matrix, dtype=np.float32) for matrix in (data.train_labels, data.test_labels)
    )
    return lexical, labels, lexical.tfidf(data.test_texts), truth


@pytest.mark.parametrize("who", ["ours", "ours, told from all", "sklearn", "pecos"])
def test_train_and_predict(benchmark, case, peer, who):
    lexical, labels, queries, truth = case
    size = f"{labels.shape[0]:,} x {lexical.points.shape[1]:,}, {labels.shape[1]:,} labels"
    benchmark.extra_info["size"] = size
    found = []

    def ours():
        negatives = None
        if who == "ours":
            negatives = lexical.shortlists([labels], labels, NEIGHBOURS, threads=2)[0]
        weights = ngame.linear_classifiers(lexical.points, labels, negatives=negatives, threads=2)
        found.append(ngame.sparse_topk(queries, weights, K, threads=2))

    if who.startswith("ours"):
        benchmark.pedantic(ours, rounds=2, warmup_rounds=0)
    else:
        name = {"sklearn": "sklearn_linear_svc", "pecos": "pecos_xr_linear"}[who]
        call = peer(name, threads=2, x=lexical.points, y=labels, x_test=queries, k=K)
        benchmark.pedantic(call, rounds=1)
        arrays = call.result()
        arrays = tuple(arrays[key] for key in ("data", "indices", "offsets"))
        found.append(sp.csr_matrix(arrays, truth.shape))
    scores = ngame.metrics.evaluate(found[-1], truth, ks=[1, 5, 10])
    benchmark.extra_info |= {name: scores[name] for name in ("P@1", "P@5", "R@10")}
