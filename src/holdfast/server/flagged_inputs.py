"""The inputs that the guard of a server has stored, for its operator: as an .npz file, and their number by client."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from holdfast.core.errors import TargetError
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.server.http_refusals import Refused

MOST = 1000
"""largest number of inputs in one response"""


@dataclass(frozen=True)
class FlaggedInput:
    """An input on which a rule fired."""

    x: Tensor
    request: str
    row: int
    time_s: float
    scores: dict[str, float]


@dataclass(frozen=True)
class FlaggedInputs:
    """The stored inputs of a guard, and the range of their values."""

    stored: StoredInputs
    low: float = 0.0
    high: float = 1.0

    def newest(self, n: int) -> list[FlaggedInput]:
        """Return at most `n` stored inputs, the newest request first. Raises `TargetError` for a file that was
        changed.
        """
        newest: list[FlaggedInput] = []
        for flagged in self._all():
            if len(newest) == n:
                break
            newest.append(flagged)
        return newest

    def by_principal(self) -> Counter[str]:
        """Return the number of stored requests of each client, by its pseudonym in the names of the files."""
        return self.stored.by_pseudonym()

    def _all(self) -> Iterator[FlaggedInput]:
        for each in self.stored.read(newest_first=True):
            for x, row, scores in zip(each.x, each.rows, each.scores, strict=True):
                yield FlaggedInput(x, each.request, row, each.time_s, scores)


def flagged_routes(flagged: FlaggedInputs | None, permitted: Callable[[Request], object]) -> list[Route]:
    """Return the route `GET /flagged`."""

    def answer(request: Request) -> Response:
        permitted(request)
        if flagged is None:
            raise Refused(
                409,
                "the guard stores no inputs; its settings need store: {inputs: flagged}, then restart the server",
            )
        text = request.query_params.get("n", str(MOST))
        n = int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(MOST)) else 0
        if not 1 <= n <= MOST:
            raise Refused(400, f"n is {text[:20]!r}; expected 1 to {MOST} inputs, as in n=100")
        try:
            newest = flagged.newest(n)
        except (TargetError, OSError) as error:
            raise Refused(409, f"the stored inputs cannot be read: {error}") from error
        return Response(_npz(newest), media_type="application/octet-stream")

    return [Route("/flagged", answer, methods=["GET"])]


def _npz(inputs: list[FlaggedInput]) -> bytes:
    """The inputs of the shape and type of the newest one as an .npz file, which needs no pickle to be read."""
    same = [i for i in inputs if (i.x.shape, i.x.dtype) == (inputs[0].x.shape, inputs[0].x.dtype)]
    x = torch.stack([i.x for i in same]) if same else torch.empty(0)
    file = io.BytesIO()
    np.savez(
        file,
        x=(x.float() if x.dtype is torch.bfloat16 else x).numpy(),
        request=np.array([i.request for i in same], dtype=np.str_),
        row=np.array([i.row for i in same], dtype=np.int64),
        time=np.array([i.time_s for i in same], dtype=np.float64),
    )
    return file.getvalue()
