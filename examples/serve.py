"""A run behind HTTP, with starlette and uvicorn.

RUN=my-run uvicorn --app-dir examples serve:app
curl localhost:8000/predict -d '{"texts": ["solve a linear system"], "k": 5, "threshold": 0.1}'

The answer: {"kind": "probability", "labels": [[["numpy.linalg.solve", 0.93], ...]]}, a list for
each text, best first, empty for a blank text. Where the run has no probabilities, the kind is
"score": fused scores, which only rank the labels of one text.
"""

import asyncio
import os
import sys

import numpy as np
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import ngame

folder = os.environ.get("RUN") or sys.exit("RUN is not set, expected the folder of a run")
model = ngame.Model.load(folder)
calibrated = model.fusions["all"].calibration is not None
model.predict(["warm up"], 1)  # the first search prepares the indexes
one_at_a_time = asyncio.Lock()  # a prediction uses all processors
FIELDS = {"texts", "k", "threshold"}


async def predict(request):
    try:
        given = await request.json()
        if not isinstance(given, dict) or not {"texts"} <= given.keys() <= FIELDS:
            raise ValueError("the body is not an object with texts, and perhaps k and threshold")
        texts, k, threshold = given["texts"], given.get("k", 5), given.get("threshold")
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError("texts is not a list of strings")
        if type(k) is not int or k < 1:
            raise ValueError("k is not a number from 1 on")
        if not (threshold is None or type(threshold) in (int, float)):
            raise ValueError("threshold is not a number")
        async with one_at_a_time:
            return JSONResponse(await asyncio.to_thread(best, texts, k, threshold))
    except (ValueError, RecursionError) as error:  # JSON's own are ValueErrors, too
        wanted = 'expected JSON such as {"texts": ["a text"], "k": 5}'
        return JSONResponse({"error": f"{error}; {wanted}"}, status_code=400)


def best(texts, k, threshold):
    labels = [[] for _ in texts]
    asked = [place for place, text in enumerate(texts) if text.strip()]
    found = model.predict(
        [texts[place] for place in asked], k, probabilities=calibrated, threshold=threshold
    )
    for place, row in zip(asked, found, strict=True):
        order = np.argsort(-row.data, kind="stable")
        labels[place] = [[model.label_texts[row.indices[at]], float(row.data[at])] for at in order]
    return {"kind": "probability" if calibrated else "score", "labels": labels}


app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
