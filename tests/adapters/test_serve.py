"""`examples/serve.py` answers many requests at once, and says what is wrong with one."""

import json
import os
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
    request = urllib.request.Request(address, json.dumps(data).encode())
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
        for row, labels in zip(model.predict(texts, 3), found, strict=True):
            order = np.argsort(-row.data)
            assert [text for text, _ in labels] == [
                model.label_texts[i] for i in row.indices[order]
            ]
            np.testing.assert_allclose([score for _, score in labels], row.data[order], rtol=1e-3)


@pytest.mark.parametrize(
    "given",
    [
        *("text", [], {}, {"texts": "a"}, {"texts": [1]}, {"texts": ["a"], "k": 0}),
        {"texts": ["lone \ud800"]},
    ],
)
def test_bad_requests(server: Any, given: Any) -> None:
    status, answer = post(server[1], given)
    assert status == 400
    assert answer["error"]


def test_no_texts_and_more_labels_than_there_are(server: Any) -> None:
    assert post(server[1], {"texts": []}) == (200, [])
    status, (labels,) = post(server[1], {"texts": ["ba"], "k": 1000})
    assert status == 200
    assert len(labels) == tiny.LABELS
