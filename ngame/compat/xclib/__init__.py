"""The functions of pyxclib that public training codes use, over the core and readers of ngame.

Change the import; names, order of arguments, defaults and results stay:

===============================  ============================================  =====================
old import                       new import                                    holds
===============================  ============================================  =====================
``xclib.data.data_utils``        ``ngame.compat.xclib.data.data_utils``        read_sparse_file,
                                                                               write_sparse_file,
                                                                               read_gen_sparse,
                                                                               read_gen_dense,
                                                                               read_corpus,
                                                                               read_data
``xclib.evaluation.xc_metrics``  ``ngame.compat.xclib.evaluation.xc_metrics``  precision, ndcg,
                                                                               recall, hits,
                                                                               psprecision, psndcg,
                                                                               format, Metrics,
                                                                               compute_inv_propesity
``xclib.utils.clustering``       ``ngame.compat.xclib.utils.clustering``       cluster_balance,
                                                                               b_kmeans_dense,
                                                                               b_kmeans_sparse
``xclib.utils.dense``            ``ngame.compat.xclib.utils.dense``            topk,
                                                                               compute_centroid
``xclib.utils.matrix``           ``ngame.compat.xclib.utils.matrix``           SMatrix
``xclib.utils.shortlist``        ``ngame.compat.xclib.utils.shortlist``        Shortlist
``xclib.utils.sparse``           ``ngame.compat.xclib.utils.sparse``           topk, retain_topk,
                                                                               rank, normalize,
                                                                               binarize, frequency,
                                                                               sigmoid,
                                                                               csr_from_arrays,
                                                                               ll_to_sparse,
                                                                               tuples_to_sparse,
                                                                               compute_centroid
===============================  ============================================  =====================

What differs everywhere: a mistake is a TypeError, ValueError or IndexError that names the argument,
never a failed assertion; nothing is printed, so `verbose` has no effect; nothing is pickled; a
caller's matrix is changed only if an argument named `copy` is false; ties go to the
lower id; random choices come from `seed`, or if it is not given from NumPy's global generator, and
results do not depend on the number of threads. Each docstring says under Notes what else differs.
"""
