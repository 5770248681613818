"""The digits network behind LitServe: `python -m benchmarks.servers.litserve_torch WEIGHTS PORT`."""

import sys
from pathlib import Path

import litserve
import torch

from benchmarks.servers.digits import opened


class Digits(litserve.LitAPI):
    """Answers `{"instances": rows}` with `{"predictions": scores}`."""

    def setup(self, device: str) -> None:
        """Read the parameters."""
        self._net = opened(Path(sys.argv[1]))

    def decode_request(self, request: dict) -> torch.Tensor:
        """The rows of one request."""
        return torch.tensor(request["instances"])

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Their scores."""
        with torch.no_grad():
            return self._net(x)

    def encode_response(self, output: torch.Tensor) -> dict:
        """The answer."""
        return {"predictions": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Digits(), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
