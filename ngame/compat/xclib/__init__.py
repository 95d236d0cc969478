"""The functions of pyxclib that public training codes use, over the core and readers of ngame.

Write ``ngame.compat.xclib`` for ``xclib`` in the import; names, order of arguments, defaults and
results stay:

===============================  ==================================================================
old import                       holds
===============================  ==================================================================
``xclib.data.data_utils``        read_sparse_file, write_sparse_file, read_gen_sparse,
                                 read_gen_dense, read_corpus, read_data
``xclib.data.features``          FeaturesBase, DenseFeatures, SparseFeatures
``xclib.data.labels``            LabelsBase, DenseLabels, SparseLabels
``xclib.evaluation.xc_metrics``  precision, ndcg, recall, hits, psprecision, psndcg, format,
                                 recall_at_gt, micro_recall_at_gt, Metrics, Metrices,
                                 compute_inv_propesity, _setup_metric, _eval_flags, _precision,
                                 _recall, _hits, _ndcg
``xclib.utils.ann``              HNSW
``xclib.utils.clustering``       cluster_balance, b_kmeans_dense, b_kmeans_sparse
``xclib.utils.dense``            topk, compute_centroid
``xclib.utils.graph``            RandomWalk, _random_walk, normalize_graph
``xclib.utils.matrix``           SMatrix
``xclib.utils.shortlist``        Shortlist, ShortlistCentroids, ShortlistInstances
``xclib.utils.sparse``           topk, retain_topk, rank, normalize, binarize, frequency, sigmoid,
                                 csr_from_arrays, ll_to_sparse, tuples_to_sparse, compute_centroid,
                                 _map, _map_cols, _map_rows
===============================  ==================================================================

What differs everywhere: a mistake is a TypeError, ValueError or IndexError that names the argument,
never a failed assertion; nothing is printed, so `verbose` has no effect; nothing is pickled; a
caller's matrix is changed only if an argument named `copy` is false; ties go to the
lower id; random choices come from `seed`, or if it is not given from NumPy's global generator, and
results do not depend on the number of threads. Each docstring says under Notes what else differs.
"""
