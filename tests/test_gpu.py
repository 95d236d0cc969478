"""`bench/gpu.py` as far as a CPU goes: what it says without a GPU, its rows on the emulation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ngame import cuda, dispatch

BENCH = Path(__file__).parent.parent / "bench"
if not BENCH.exists():
    pytest.skip("the benchmarks are not here", allow_module_level=True)

try:
    from ngame import _cuda_emulated as emulated
except ImportError:
    emulated = None


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    monkeypatch.setattr(gpu, "ROUNDS", 2)
    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_missing_is_said_in_a_line():
    # As a user calls it: the script finds its neighbours, which a safe path would hide.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, BENCH / "gpu.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu.py: this machine lacks ")
    assert "a GPU that torch sees" in line


def test_training_needs_data_and_model(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--train", "somewhere"])
    assert "--train and --model go together" in capsys.readouterr().err


def test_every_timing_on_the_emulation(gpu, monkeypatch, tmp_path, capsys):
    if emulated is None:
        pytest.skip("no emulated GPU core: built with -Ccmake.define.NGAME_CUDA_EMULATE=ON")
    monkeypatch.setattr(cuda, "_cuda", emulated)
    monkeypatch.setattr(dispatch, "on_gpu", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(gpu, "QUALITY", 0.9)  # so few points may be lucky on either side
    sizes = gpu.Sizes(
        clusterings=((200, 16, "float32", "1 s"), (150, 24, "bfloat16", "1 s")),
        search=(40, 170, 16),
        queries_at_once=30,
        copied=1 << 12,
        side=16,
    )
    rows = list(gpu.timings("cpu", sizes))
    assert [row.what for row in rows] == [
        "limit: copy",
        "limit: bfloat16 product",
        "clusters of 32",
        "clusters of 32",
        "bfloat16 product alone",
        "exact top-100",
    ]
    for row in rows:
        assert row.passed, row
        assert len(row.times) == 2
        assert min(row.times) > 0
    bandwidth = 2 * sizes.copied / sum(rows[0].times) * 2
    assert rows[2].floor == pytest.approx((200 * 16 * 4 + 200 * 4) / bandwidth)
    assert rows[3].floor == pytest.approx((150 * 24 * 2 + 150 * 4) / bandwidth)
    assert rows[5].floor == pytest.approx(sum(rows[4].times) / 2)
    # What is wrong is seen, said, kept, and the status.
    monkeypatch.setattr(gpu, "QUALITY", 2)
    wrong = gpu.clustering("cpu", 100, 8, "float32", "1 s", 1e9)
    assert not wrong.passed
    output = tmp_path / "rows.jsonl"
    assert gpu.report(iter(rows), None) == 0
    assert gpu.report(iter([rows[5], wrong]), output) == 1
    table = capsys.readouterr().out.splitlines()[-4:]
    assert {line.count("|") for line in table} == {9}
    assert "**" in table[-1]
    assert "**" not in table[-2]
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["passed"] for row in kept] == [True, False]
    assert kept[0]["times"] == rows[5].times


def test_a_search_that_is_wrong_is_seen(gpu, monkeypatch):
    import ngame

    def off_by_one(queries, items, k):
        cosines = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(items).T
        found = cosines.topk(k + 1)
        return found.values[:, 1:], found.indices[:, 1:].int()

    monkeypatch.setattr(ngame, "topk_arrays", off_by_one)
    sizes = gpu.Sizes(search=(40, 170, 16), queries_at_once=30)
    assert not list(gpu.search("cpu", sizes))[-1].passed


def test_points_are_those_of_the_other_benchmarks(gpu):
    """By the mean cosine of a point with others: the recipe is the same, the numbers are not."""
    import inputs

    x = gpu.mixture(3000, 32, "float32", "cpu")
    y = torch.from_numpy(inputs.mixture(3000, 32).copy())
    assert x.shape == y.shape
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3000))
    near = [(z @ z.T).fill_diagonal_(-1).amax(1).mean().item() for z in (x, y)]
    assert near[0] == pytest.approx(near[1], abs=0.02)


def test_rows_of_a_training(gpu):
    log = [
        {"stage": "encoder", "seconds": 3.0, "refresh_share": 0.0},
        {"stage": "encoder", "seconds": 5.0, "refresh_share": 0.004},
        {"stage": "classifier", "seconds": 1.0, "refresh_share": 0.02},
    ]
    rows = list(gpu.training_rows("data", log, {"fused": {"P@1": 0.5, "R@10": 0.25}}))
    assert [row.times for row in rows] == [[3.0, 5.0], [1.0], []]
    assert rows[0].checked == "refresh 0.40 % of an epoch at most"
    assert rows[2].cells()[-1] == "P@1 50.00, R@10 25.00"


@pytest.mark.parametrize(
    ("status", "summary", "passed"),
    [
        (0, "75 passed, 150 deselected in 9.71s", True),
        (0, "75 passed, 3 skipped in 9.71s", False),
        (1, "1 failed, 74 passed in 9.71s", False),
        (1, "", False),
    ],
)
def test_what_passes_for_a_pass(gpu, monkeypatch, status, summary, passed):
    """Whatever runs the tests; a test that is skipped has not passed."""
    code = f"print({summary!r}); raise SystemExit({status})"
    monkeypatch.setattr(gpu, "TESTS", ["-c", code])
    assert gpu.tested("tests", ["env"]).passed is passed
