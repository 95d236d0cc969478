"""`bench/gpu` as far as a CPU goes: what it says without a GPU, its rows on the emulation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
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
    from gpu import table

    monkeypatch.setattr(table, "ROUNDS", 2)
    return table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_missing_is_said_in_a_line():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), *sys.path])}
    command = [sys.executable, "-m", "gpu"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == "gpu: this machine lacks what is timed: a GPU that torch sees"


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
        *["clusters of 32", "clusters of 32, 5 rounds of refinement"] * 2,
        "bfloat16 product alone",
        "exact top-100",
    ]
    for row in rows:
        assert row.passed, row
        assert len(row.times) == 2
        assert min(row.times) > 0
    bandwidth = 2 * sizes.copied / sum(rows[0].times) * 2
    assert rows[2].floor == pytest.approx((200 * 16 * 4 + 200 * 4) / bandwidth)
    assert rows[4].floor == pytest.approx((150 * 24 * 2 + 150 * 4) / bandwidth)
    assert rows[7].floor == pytest.approx(sum(rows[6].times) / 2)
    # What is wrong is seen, said, kept, and the status.
    monkeypatch.setattr(gpu, "QUALITY", 2)
    wrong = next(gpu.clusterings("cpu", 100, 8, "float32", "1 s", 1e9))
    assert not wrong.passed
    output = tmp_path / "rows.jsonl"
    assert gpu.report(iter(rows), None) == 0
    assert gpu.report(iter([rows[7], wrong]), output) == 1
    table = capsys.readouterr().out.splitlines()[-4:]
    assert {line.count("|") for line in table} == {9}
    assert "**" in table[-1]
    assert "**" not in table[-2]
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["passed"] for row in kept] == [True, False]
    assert kept[0]["times"] == rows[7].times


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


def test_what_a_step_of_training_costs(gpu, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    from gpu import training

    data = tiny.dataset()
    folder = tiny.transformer(data, tmp_path)
    steps = training.Steps(8, warm=1, timed=2, profiled=1, by_operator=1, watched=2)
    part = training.part(data, steps)
    assert len(part.train_texts) == 90
    training.encoding(training.measure(part, str(folder), steps, "cpu", "encoder.max_length=32"))
    training.count(data, str(folder), 8, 2, "encoder.max_length=32")
    said = capsys.readouterr().out
    assert "batch 8: " in said
    # One update launches at least the products of a layer and their gradients, and one AdamW.
    (counted,) = re.findall(r"batch 8: (\d+) launches", said)
    assert 50 < int(counted) < 500
    monkeypatch.setattr(training, "load_dataset", lambda folder: data)
    monkeypatch.setattr(sys, "argv", ["training", "data", str(folder), "--count"])
    calls = []
    monkeypatch.setattr(training, "count", lambda *given: calls.append(given))
    training.main()
    assert [given[:2] for given in calls] == [(data, str(folder))] * 2
    assert "aten::addmm" in said
    assert "waits a step: 0.0" in said
    assert "24 labels encoded in" in said


LISTING = """
.text._ZN5ngame4cuda12_GLOBAL__N_14calmILi4EEEvNS0_6MatrixE:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
	//## File "/somewhere/rows.h", line {line}
.L_x_2:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R6.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R6.64+0x200] ;
	//## File "/somewhere/rows.h", line 1
        /*0040*/                   FADD R4, R4, R8 ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_the_length_of_loops_is_read_off_machine_code(gpu):
    from gpu import counts

    lines = (counts.SOURCES / "rows.h").read_text().splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if "packs[row] = " in text)
    (code,) = counts.disassembled(LISTING.format(line=line))
    assert counts.short(code.name) == "calm"
    assert code.loops == [(2, 5), (1, 6)]
    assert code.own(1, 6) == 2
    assert code.once == 2
    # Two loads a trip: of a loop that does one, the compiler has made one of two.
    assert code.trip(*counts.PROJECT, 2) == 4
    assert code.trip(*counts.PROJECT, 1) == 2
    with pytest.raises(LookupError, match="no loop"):
        code.trip(*counts.PROJECT_ROW)


def test_what_counting_needs_is_said(gpu, monkeypatch, tmp_path):
    from gpu import counts

    monkeypatch.setattr(sys, "argv", ["counts", str(tmp_path)])
    monkeypatch.setattr(counts.shutil, "which", lambda tool: None)
    with pytest.raises(SystemExit, match="not on the path: nvcc, nvdisasm"):
        counts.main()


@pytest.fixture
def machine(tmp_path):
    """A machine whose commands are fakes: each says its name and succeeds, unless told to fail."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("nvidia-smi", "python3", "compute-sanitizer", "ncu"):
        fake = tools / name
        fake.write_text(
            f'#!/bin/bash\necho "{name} $*" | tee -a {tmp_path}/calls\n'
            '[ -z "$FAIL" ] || [[ "$*" != *$FAIL* ]]\n'
        )
        fake.chmod(0o755)

    def run(*arguments, **env):
        (tmp_path / "calls").unlink(missing_ok=True)
        env = {"PATH": f"{tools}:/usr/bin:/bin", "OUT": str(tmp_path / "out"), **env}
        command = ["bash", BENCH / "gpu/run.sh", *arguments]
        done = subprocess.run(command, cwd=BENCH.parent, env=env, capture_output=True, text=True)
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


def test_one_call_takes_every_step(machine, tmp_path):
    folder = tmp_path / "kit"
    for name in ("data", "model"):
        (folder / name).mkdir(parents=True)
    (folder / "ngame-0.1-cp312.whl").touch()
    done, calls = machine(str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[1].strip(":") for line in done.stdout.splitlines() if "status 0" in line]
    assert steps == [
        *("the", "tests", "profile", "timings", "kernels", "training"),
        *("memcheck", "ncu", "ncu", "racecheck", "synccheck"),
    ]
    installed = next(call for call in calls if "pip install" in call)
    assert str(folder / "ngame-0.1-cp312.whl") in installed
    assert "train" in (tmp_path / "out/all.log").read_text()


def test_a_step_that_fails_does_not_end_the_call(machine):
    done, calls = machine(FAIL="test_cuda.py")
    assert done.returncode == 4  # the tests, and three times under a sanitizer
    assert any("-m gpu -o" in call for call in calls)
    # Without a kit the core is built.
    assert any("NGAME_CUDA=ON" in call for call in calls)


def test_without_a_core_that_loads_nothing_is_timed(machine):
    done, calls = machine(FAIL="import ngame._cuda")
    assert done.returncode == 1
    assert not any("-m gpu" in call for call in calls)


def test_what_has_no_time_left_is_skipped(machine):
    done, calls = machine(LIMIT="10")
    assert "a build of its own: no time left" in done.stdout
    assert done.returncode == 1
    assert not any("pytest" in call for call in calls)
