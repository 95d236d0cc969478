"""Every name that fourteen public training codes import from pyxclib is here."""

from importlib import import_module

import pytest

# Counted in LEVER, Renée, PINA (in PECOS), GalaXC, DECAF, MUFIN, ViXML, mogicX, NGAME, DEXA,
# DeepXML, SiameseXML, ECLARE and CascadeXML; and what a public evaluator imports.
NAMES = {
    "data.data_utils": "read_corpus read_data read_gen_dense read_gen_sparse read_sparse_file "
    "write_sparse_file",
    "data.features": "DenseFeatures FeaturesBase SparseFeatures",
    "data.labels": "DenseLabels LabelsBase SparseLabels",
    "evaluation.xc_metrics": "Metrices Metrics _eval_flags _hits _ndcg _precision _recall "
    "_setup_metric compute_inv_propesity format hits micro_recall_at_gt ndcg precision psndcg "
    "psprecision recall recall_at_gt",
    "utils.ann": "HNSW",
    "utils.clustering": "b_kmeans_dense b_kmeans_sparse cluster_balance",
    "utils.dense": "compute_centroid topk",
    "utils.graph": "RandomWalk _random_walk normalize_graph",
    "utils.matrix": "SMatrix",
    "utils.shortlist": "Shortlist ShortlistCentroids ShortlistInstances",
    "utils.sparse": "_map _map_cols _map_rows binarize compute_centroid csr_from_arrays frequency "
    "ll_to_sparse normalize rank retain_topk sigmoid topk tuples_to_sparse",
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_resolves(module):
    found = import_module(f"ngame.compat.xclib.{module}")
    missing = [name for name in NAMES[module].split() if not callable(getattr(found, name, None))]
    assert missing == []


def test_the_package_lists_them():
    text = import_module("ngame.compat.xclib").__doc__
    assert text
    for module, names in NAMES.items():
        assert f"``xclib.{module}``" in text
        for name in names.split():
            assert name in text, name
