"""A model behind LitServe, with the batches of the row `serving`.

PYTHON -m benchmarks.lit_server NETWORK PORT FORM

PYTHON is that of the environment of the servers, and FORM `json` or `raw`: the content of a request is JSON, as for the
Open Inference Protocol, or the bytes of one image and nothing else, since LitServe has no binary form of its own.
"""

import sys
from typing import Annotated

import litserve
import numpy as np
import torch
from fastapi import Body, Response
from torch import Tensor

from benchmarks.networks import network

MAX_ROWS, BATCH_TIMEOUT_S, SHAPE = 64, 0.001, (3, 32, 32)


class Api(litserve.LitAPI):
    """Answers `infer` of the Open Inference Protocol in JSON, for one image a request, without any check."""

    def __init__(self, name: str) -> None:
        super().__init__(max_batch_size=MAX_ROWS, batch_timeout=BATCH_TIMEOUT_S, api_path="/infer")
        self.name = name

    def setup(self, device: str) -> None:
        """Open the network."""
        torch.set_num_threads(1)
        self.net = network(self.name).module

    def decode_request(self, request: dict) -> Tensor:  # type: ignore[type-arg]
        """The image of a request."""
        (tensor,) = request["inputs"]
        return torch.from_numpy(np.array(tensor["data"], np.float32)).reshape(tensor["shape"][1:])

    def predict(self, x: Tensor) -> Tensor:
        """The scores of a batch."""
        with torch.inference_mode():
            logits: Tensor = self.net(x)
        return logits

    def encode_response(self, output: Tensor) -> object:
        """The response with the scores of an image."""
        tensor = {"name": "scores", "datatype": "FP32", "shape": [1, len(output)], "data": output.tolist()}
        return {"model_name": self.name, "model_version": "1", "outputs": [tensor]}


class RawApi(Api):
    """Answers with the bytes of the scores to the bytes of an image."""

    def decode_request(self, request: Annotated[bytes, Body()]) -> Tensor:
        """The image of a request."""
        return torch.from_numpy(np.frombuffer(request, np.float32).copy()).reshape(SHAPE)

    def encode_response(self, output: Tensor) -> object:
        """The response with the scores of an image."""
        return Response(output.numpy().tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve until the process is ended."""
    name, port, form = sys.argv[1:]
    api = (Api if form == "json" else RawApi)(name)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(port),
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main()
