"""`examples/serve.py` answers many requests at once, and says what is wrong with one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import ngame

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = tiny.dataset()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run, and the address at which it is served."""
    run = tmp_path_factory.mktemp("run") / "RUN"
    ngame.train(DATA, tiny.config(), folder=run)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "serve:app", "--app-dir", EXAMPLES, "--port", str(port)],
        env={**os.environ, "RUN": str(run)},
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield run, f"http://127.0.0.1:{port}/predict"
    finally:
        process.terminate()
        process.communicate()


def test_without_a_run() -> None:
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--app-dir", EXAMPLES]
    env = {name: value for name, value in os.environ.items() if name != "RUN"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "RUN is not set, expected the folder of a run\n")


def post(address: str, data: Any) -> tuple[int, Any]:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(address, body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_forty_requests_at_eight_in_parallel(server: Any) -> None:
    run, address = server
    asked = [DATA.test_texts[row : row + 1 + row % 5] for row in range(40)]
    seconds = []

    def ask(texts: list[str]) -> tuple[int, Any]:
        start = time.perf_counter()
        answer = post(address, {"texts": texts, "k": 3})
        seconds.append(time.perf_counter() - start)
        return answer

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, asked))
    print(f"p50 {np.median(seconds):.3f} s, p99 {np.quantile(seconds, 0.99):.3f} s")
    model = ngame.Model.load(run)
    assert [status for status, _ in answers] == [200] * 40
    for texts, (_, found) in zip(asked, answers, strict=True):
        assert found["kind"] == "probability"
        expected = model.predict(texts, 3, probabilities=True)
        for row, labels in zip(expected, found["labels"], strict=True):
            order = np.argsort(-row.data, kind="stable")
            assert [text for text, _ in labels] == [
                model.label_texts[i] for i in row.indices[order]
            ]
            given = [probability for _, probability in labels]
            np.testing.assert_allclose(given, row.data[order], rtol=1e-3)
            assert 0 <= min(given) <= max(given) <= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (b"texts=a", "Expecting value: line 1 column 1"),
        (b"\xff", "can't decode byte 0xff"),
        (b"[" * 100_000, "recursion"),
        *((given, "the body is not an object with texts") for given in ("text", [], {}, 5, None)),
        ({"texts": ["a"], "K": 3}, "the body is not an object with texts, and perhaps k and"),
        ({"texts": "a"}, "texts is not a list of strings"),
        ({"texts": [1]}, "texts is not a list of strings"),
        ({"texts": ["a"], "k": 0}, "k is not a number from 1 on"),
        ({"texts": ["a"], "threshold": "b"}, "threshold is not a number"),
        ({"texts": ["a"], "threshold": 2}, "threshold is 2, expected a probability"),
        ({"texts": ["lone \ud800"]}, "texts[0] holds a lone surrogate"),
    ],
)
def test_bad_requests(server: Any, given: Any, says: str) -> None:
    status, answer = post(server[1], given)
    assert status == 400
    assert says in answer["error"]
    assert answer["error"].endswith('; expected JSON such as {"texts": ["a text"], "k": 5}')


def test_labels_that_are_likely(server: Any) -> None:
    texts = DATA.test_texts[:20]
    every = post(server[1], {"texts": texts, "k": 5})[1]["labels"]
    likely = post(server[1], {"texts": texts, "k": 5, "threshold": 0.5})[1]["labels"]
    assert likely == [[pair for pair in labels if pair[1] >= 0.5] for labels in every]
    assert 0 < sum(map(len, likely)) < sum(map(len, every))


def test_no_texts_and_more_labels_than_there_are(server: Any) -> None:
    none: list[Any] = []
    assert post(server[1], {"texts": []}) == (200, {"kind": "probability", "labels": none})
    status, answer = post(server[1], {"texts": ["", "ba", " \n"], "k": 1000})
    assert status == 200
    assert [len(labels) for labels in answer["labels"]] == [0, tiny.LABELS, 0]


def test_a_run_without_probabilities(server: Any, tmp_path: Path) -> None:
    run = tmp_path / "RUN"
    shutil.copytree(server[0], run)
    fusions = json.loads((run / "fusion.json").read_text())
    fusions["all"]["calibration"] = None  # as with few held-out points
    (run / "fusion.json").write_text(json.dumps(fusions))
    code = "import json, serve; print(json.dumps(serve.best(['ba', ''], 2, None)))"
    env = {**os.environ, "RUN": str(run), "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    answer = json.loads(subprocess.check_output([sys.executable, "-c", code], env=env))
    row = ngame.Model.load(run).predict(["ba"], 2)
    assert answer["kind"] == "score"
    scores = [[score for _, score in labels] for labels in answer["labels"]]
    assert scores == [pytest.approx(sorted(row.data, reverse=True)), []]
