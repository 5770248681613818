"""A model behind bare FastAPI and uvicorn, with the batches of `holdfast.server.requests` or without any.

python -m benchmarks.bare_server NETWORK PORT CALLS

CALLS is `batches`, or `requests` for an application that calls the model with each request in the event loop.
"""

import json
import sys

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.networks import network
from holdfast.server.requests import Batcher

MAX_ROWS, MAX_LATENCY_S = 64, 5.0


def application(name: str, calls: str) -> FastAPI:
    """Answers `infer` of the Open Inference Protocol, in JSON and with tensors as bytes, without any check."""
    model = network(name).module

    def answer(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            logits = model(batch[0] if len(batch) == 1 else torch.cat(batch))
        return list(torch.split(logits, [len(x) for x in batch]))

    batcher: Batcher[torch.Tensor, torch.Tensor] = Batcher(
        answer, max_rows=MAX_ROWS, max_latency_s=MAX_LATENCY_S
    )
    app = FastAPI()

    @app.post("/v2/models/{model}/infer")
    async def infer(model: str, request: Request) -> Response:
        body = await request.body()
        header = request.headers.get("inference-header-content-length")
        content = json.loads(body if header is None else body[: int(header)])
        (tensor,) = content["inputs"]
        if header is None:
            values = np.array(tensor["data"], np.float32)
        else:
            values = np.frombuffer(body[int(header) :], np.float32).copy()
        x = torch.from_numpy(values).reshape(tensor["shape"])
        logits = answer([x])[0] if calls == "requests" else await batcher.submit(x, len(x))
        output = {"name": "scores", "datatype": "FP32", "shape": list(logits.shape)}
        head = {"model_name": model, "model_version": "1"}
        if header is None:
            data = logits.flatten().tolist()
            return Response(
                json.dumps({**head, "outputs": [{**output, "data": data}]}), media_type="application/json"
            )
        tail = logits.numpy().tobytes()
        output["parameters"] = {"binary_data_size": len(tail)}
        text = json.dumps({**head, "outputs": [output]}).encode()
        return Response(
            text + tail,
            media_type="application/octet-stream",
            headers={"inference-header-content-length": str(len(text))},
        )

    return app


def main() -> None:
    """Serve until the process is ended."""
    torch.set_num_threads(1)
    app = application(sys.argv[1], sys.argv[3])
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
