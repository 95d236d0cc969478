"""`ngame.metrics.evaluate` beside napkinXC, and how its cost grows.

    pytest bench/bench_metrics.py --peers PYTHON

`bytes` is the predictions, read once.
"""

import inputs
import numpy as np
import pytest

from ngame import metrics


def evaluate(benchmark, predicted, truth, **options):
    """Time ours."""
    benchmark.extra_info["size"] = f"{predicted.shape[0]:,} x {predicted.nnz:,}"
    benchmark.extra_info["bytes"] = predicted.data.nbytes + predicted.indices.nbytes
    found = benchmark.pedantic(
        metrics.evaluate, (predicted, truth), options, rounds=9, warmup_rounds=1
    )
    assert 0 < found["P@1"] < 1
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_all_five(benchmark, quick, threads):
    """P, N, R, PSP and PSN at 1, 3, 5: the case of the project's bar."""
    predicted, truth = inputs.predictions(2000 if quick else 134_835)
    weights = metrics.inverse_propensity(truth)
    evaluate(benchmark, predicted, truth, inverse_propensity=weights, threads=threads)


@pytest.mark.parametrize("who", ["ours", "napkinxc"])
def test_beside(benchmark, peer, quick, who):
    """Ours gives P, N and R. napkinXC gives P alone, of lists of ids that are already sorted."""
    predicted, truth = inputs.predictions(2000 if quick else 20_000)
    if who == "ours":
        evaluate(benchmark, predicted, truth, ks=[1, 2, 3, 4, 5], threads=2)
        return
    found = peer("napkinxc_precision", threads=2, predictions=predicted, truth=truth, k=5)
    benchmark.pedantic(found, rounds=1)
    expected = metrics.evaluate(predicted, truth, ks=[1, 5])
    assert np.asarray(found.result()["P"])[[0, 4]] == pytest.approx(
        [expected["P@1"], expected["P@5"]], abs=1e-6
    )


@pytest.mark.parametrize("rows", [10_000, 40_000, 160_000])
def test_rows(benchmark, quick, rows):
    """Growth with the number of rows."""
    evaluate(benchmark, *inputs.predictions(rows // 20 if quick else rows), threads=2)


@pytest.mark.parametrize("width", [10, 100, 1000])
def test_width(benchmark, quick, width):
    """Growth with the number of predictions a row."""
    evaluate(benchmark, *inputs.predictions(4000 if quick else 10_000, k=width), threads=2)


@pytest.mark.parametrize("ks", [(1, 3, 5), (1, 10, 100)])
def test_cutoffs(benchmark, quick, ks):
    """Large k cost no more than small ones."""
    evaluate(benchmark, *inputs.predictions(500 if quick else 40_000), ks=ks, threads=2)
