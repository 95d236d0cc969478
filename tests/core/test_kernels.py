"""The inner loops at every SIMD level, through the functions that use them, around every tail."""

import os
import subprocess
import sys

import numpy as np
import pytest
import reference

import ngame
from ngame import _core

DIMS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_products_and_norms(rng, simd, dim, dtype):
    x = rng.standard_normal((37, dim)).astype(dtype)
    for metric in ("cosine", "dot"):
        scores, ids = ngame.topk_arrays(x, x, 37, metric=metric)
        exact = reference.topk(x, x, 37, metric)[0]
        # A sum of d products, each rounded once, is off by at most about d half-units in the last
        # place of the sum of their magnitudes, which is at most the product of the norms.
        norms = np.linalg.norm(x.astype(np.float64), axis=1) if metric == "dot" else np.ones(37)
        bound = (dim + 8) * 2.0**-24 * norms.max() ** 2
        assert np.abs(scores - exact).max() <= bound
        assert (np.sort(ids, axis=1) == np.arange(37)).all()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_projection_of_large_nodes(rng, simd, dim, dtype):
    # Two directions with noise far smaller than between them: one projection parts them.
    rows = 33_000  # more than are copied, whatever the dimension
    truth = rng.permutation(rows) < rows // 2
    x = np.where(truth, 1, -1)[:, None] * np.linspace(1, 2, dim)
    found = ngame.balanced_clusters(x.astype(dtype), n_clusters=2)
    assert {bool(truth[ids].all()) for ids in found} == {True, False}
    assert {bool(truth[ids].any()) for ids in found} == {True, False}


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_rows(rng, simd, offset):
    memory = rng.standard_normal(40 * 21 + offset, dtype=np.float32)
    x = memory[offset:].reshape(40, 21)
    apart = np.zeros((40, 29), np.float32)[:, offset : offset + 21]
    apart[:] = x
    for other in (x, apart):
        scores, ids = ngame.topk_arrays(other, other, 5)
        expected = ngame.topk_arrays(x.copy(), x.copy(), 5)
        assert (scores == expected[0]).all()
        assert (ids == expected[1]).all()


def test_every_half(simd):
    # Each of the finite halves, subnormals included, comes through widening unchanged.
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    # 24 columns: whole vectors and a rest at each width.
    padding = np.zeros(-len(halves) % 24, np.float16)
    x = np.concatenate([halves, padding]).reshape(-1, 24)
    scores, ids = ngame.topk_arrays(np.eye(24, dtype=np.float16), x, len(x), metric="dot")
    widened = np.empty((24, len(x)), np.float32)
    np.put_along_axis(widened, ids, scores, axis=1)
    assert (x.astype(np.float32) == widened.T).all()


def test_levels_agree(mixture):
    x = mixture(500, 40)
    before = _core.simd_level()
    found = {}
    for level in _core.simd_levels():
        _core.set_simd_level(level)
        clusters = ngame.balanced_clusters(x, size=10)
        found[level] = (ngame.topk_arrays(x, x, 20)[0], clusters.coherence(x))
    _core.set_simd_level(before)
    scores, tightness = found["baseline"]
    for other, other_tightness in found.values():
        np.testing.assert_allclose(other, scores, atol=1e-6)
        assert other_tightness == pytest.approx(tightness, rel=0.02)


def test_choice_of_level():
    levels = _core.simd_levels()
    assert levels[0] == "baseline"
    assert _core.simd_level() in levels
    with pytest.raises(ValueError, match="level is 'mmx', but this machine can run only: baseline"):
        _core.set_simd_level("mmx")


def import_with(level):
    return subprocess.run(
        [sys.executable, "-c", "import ngame; print(ngame._core.simd_level())"],
        env={**os.environ, "NGAME_SIMD": level},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("level", _core.simd_levels())
def test_environment_forces_a_level(level):
    assert import_with(level).stdout.strip() == level


def test_environment_with_unknown_level():
    failed = import_with("mmx")
    assert failed.returncode != 0
    assert "ImportError: NGAME_SIMD is 'mmx', but this machine can run only" in failed.stderr
