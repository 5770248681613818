"""A runtime of MLServer that serves the digits network, as its documentation describes custom runtimes."""

from pathlib import Path

import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import get_model_uri

from benchmarks.servers.digits import opened


class Digits(MLModel):
    """Answers rows (n, 64) with scores (n, 10) in FP32."""

    async def load(self) -> bool:
        """Read the parameters that the model's `uri` names."""
        self._net = opened(Path(await get_model_uri(self._settings)))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The scores of the rows of one request."""
        x = torch.from_numpy(NumpyCodec.decode_input(payload.inputs[0]))
        with torch.no_grad():
            scores = self._net(x).numpy()
        outputs = [NumpyCodec.encode_output("scores", scores)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
