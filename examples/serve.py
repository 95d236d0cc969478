"""A run behind HTTP, with starlette and uvicorn.

RUN=my-run uvicorn --app-dir examples serve:app
curl localhost:8000/predict -d '{"texts": ["solve a linear system"], "k": 5}'
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
model.predict(["warm up"], 1)  # the first search prepares the indexes
one_at_a_time = asyncio.Lock()  # a prediction uses all processors


async def predict(request):
    try:
        given = await request.json()
        texts, k = given.get("texts"), given.get("k", 5)
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise TypeError("texts is not a list of strings")
        if type(k) is not int or k < 1:
            raise ValueError("k is not a number from 1 on")
        async with one_at_a_time:
            return JSONResponse(await asyncio.to_thread(best, texts, k))
    except (AttributeError, TypeError, ValueError) as error:
        return JSONResponse({"error": str(error)}, status_code=400)


def best(texts, k):
    rows = ((row, np.argsort(-row.data)) for row in model.predict(texts, k))
    return [
        [[model.label_texts[row.indices[at]], float(row.data[at])] for at in order]
        for row, order in rows
    ]


app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
