"""Fixtures that several test files share."""

import numpy as np
import pytest
from hypothesis import settings

from ngame import _core

# The machine may be busy and the first call loads libraries: no deadline. The examples are the same
# on every run.
settings.register_profile("ngame", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ngame")


@pytest.fixture
def rng():
    return np.random.default_rng(20220221)


@pytest.fixture(params=_core.simd_levels())
def simd(request):
    """Run the test once at every SIMD level of this machine."""
    before = _core.simd_level()
    _core.set_simd_level(request.param)
    yield request.param
    _core.set_simd_level(before)


@pytest.fixture(scope="session")
def mixture():
    """Make n points on the unit sphere that gather around topics, float32 [n, d]."""

    def make(n, d, seed=0):
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((max(4, n // 30), d), dtype=np.float32)
        x = centres[rng.integers(len(centres), size=n)]
        x += 0.8 * rng.standard_normal((n, d), dtype=np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return make
