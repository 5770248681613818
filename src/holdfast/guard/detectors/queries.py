"""Stateful detector of query-based attacks: it counts queries that are near-duplicates of earlier queries, over all
clients, workers and machines that share its state.

A black-box attack sends many slightly different versions of one input. Each query is compared with the first query of
each cluster of near duplicates by keyed sketches (`fingerprints.py`). The score of a query is the weighted number of
earlier queries of its cluster, whichever principal (client) sent them, or that of its principal over all clusters,
whichever is larger. Related to the detectors of Chen, Carlini & Wagner, "Stateful detection of black-box adversarial
attacks", SPAI 2020, arXiv:1907.05587, Li et al. (Blacklight; see `blacklight.py`), and Li et al., "Query provenance
analysis", IEEE S&P 2025, arXiv:2405.20641. Unlike these, distances are measured after averaging over cells, so that
all inputs inside a small ball are near duplicates. An attacker that sees rejections gains nothing from larger
steps inside it.

What does not count, or counts little:
- Exact repeats of an answered query, such as retries and popular inputs. They tell an attacker nothing new. Values are
  compared as they were sent, so that differences below the resolution of float32 are near duplicates.
- Differences that natural changes explain, such as those between frames of a video (`fingerprints.natural`).
- Differences that are much smaller than the radius, such as re-encoded images and sensor noise.
An attacker who knows this keeps all queries so near to a first one, or shifts the brightness of the first one, so that
all differences seem natural (`informed.py`). Therefore the weight of such queries grows with their number, and about 25
of them in a cluster are suspicious.

What evades it:
- Query blinding: an attack that transforms each query by its own shift, rotation or crop. Small shifts look like a
  video and count little; large ones are no near duplicates. Both cost the attacker accuracy.
- Many inputs with few queries each: an attacker who needs fewer queries for an input than the threshold, or uses many
  principals on many inputs. Universal perturbations and transfer attacks need no near duplicates of an input.
- Gradients estimated far from the input, at distances above the radius.
- Whoever knows the key can compute changes that leave the sketches different.

A static camera, whose frames differ by sensor noise alone, looks like an attack with small steps: its queries are
rejected after about 25 frames in a half-life, unless the detector does not count small steps (`for_cameras`).
"""

import itertools
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.types import Fraction, NonNegative, Positive
from holdfast.guard.detectors.fingerprints import Fingerprinter, Fingerprints, n_features_of, unexplained
from holdfast.guard.detectors.query_clusters import QueryCluster, QueryState, StateView, Wanted

_CAMERA_NOISE = 0.25  # in multiples of the radius: noise of 10/255 and JPEG of quality 30 to 95 on CIFAR-10
_SETTLED = 4  # multiples of the threshold; two half-lives pass before such a cluster is accepted again


@dataclass(frozen=True)
class QuerySettings:
    """Settings of the stateful query detector."""

    radius: Positive = 0.75
    """distance of low-pass inputs up to which a query is a near duplicate; `radius_for` chooses it from benign inputs.
    The default suits images in [0, 1]"""
    threshold: Positive = 10.0
    """score from which a query is suspicious: the weighted number of near duplicates"""
    natural: Fraction = 0.25
    """fraction of a difference that may remain unexplained by natural changes, such as motion in a video"""
    faint: Fraction = 0.1
    """weight of the first query of a cluster whose difference is natural or very small"""
    growth: NonNegative = 0.1
    """increase of this weight for each unit of the mass of the cluster, up to 1"""
    noise: Fraction = 0.05
    """size of very small differences, as a fraction of the radius"""
    full: Fraction = 0.2
    """size beyond `noise` and `natural` at which a difference has the weight 1, as a fraction of the radius"""
    principal_mass: Positive = 50.0
    """weighted number of near duplicates in all clusters from which a principal may be suspicious"""
    principal_share: Fraction = 0.25
    """fraction of near duplicates among its queries from which a principal may be suspicious"""
    cells: Annotated[int, Ge(1)] = 200
    """largest number of cells, over all channels, into which an image is divided"""
    tables: Annotated[int, Ge(1)] = 8
    """number of hashes of a sketch; more find near duplicates more reliably"""
    planes: Annotated[int, Ge(1)] = 10
    """number of projections in a hash; more are faster with many clusters and less reliable"""
    bucket: Annotated[float, Gt(0)] = 4.0
    """length of an interval of these projections, as a multiple of the radius"""


@dataclass(frozen=True)
class QueryDetail:
    """Findings of the query detector about one query, for the audit. They are never returned to a client."""

    cluster: int | None = None
    """key of the nearest cluster; None for a query that is near no other"""
    near_duplicates: float = 0.0
    """weighted number of earlier queries near this one and of this one, at the present time"""
    members: int = 1
    """number of queries of the cluster since it was created"""
    distance: float = 0.0
    """distance to the first query of the cluster"""
    unexplained: float = 0.0
    """part of this distance that natural changes do not explain; all of it if the score is far above the threshold"""
    weight: float = 0.0
    """weight with which this query counts"""
    repeat: bool = False
    """whether it is an exact repeat of an answered query"""
    principal_mass: float = 0.0
    """weighted number of near duplicates of the principal, in all clusters"""
    principal_share: float = 0.0
    """fraction of near duplicates among the queries of the principal"""
    lost: bool = False
    """whether the state could not be reached, so that the score follows from `fail` of the state alone"""


_NEW = QueryDetail()
"""of a query that is near no other; one object, because most queries are such"""


@dataclass(frozen=True)
class QueryScores:
    """Scores of a batch of n queries."""

    scores: NDArray[np.float64]
    """(n); a query with a score of the threshold or more is suspicious"""
    details: tuple[QueryDetail, ...]
    """(n)"""


class QueryDetector:
    """Stateful query detector for inputs of one shape. `key` is secret, the same for all processes with a common state,
    and changes the meaning of the state: use a new state with a new key.

    Cost of a query, for small images and with the state in SQLite: about 0.35 ms of CPU time, and a third of it in
    batches of 8 queries. Near duplicates cost as much again, until their score is far above the threshold.
    """

    def __init__(
        self,
        key: bytes,
        state: QueryState,
        shape: Sequence[int],
        settings: QuerySettings | None = None,
        **changed: float,
    ) -> None:
        self.settings = replace(settings or QuerySettings(), **changed)  # type: ignore[arg-type]
        self.state = state
        self.fingerprinter = fingerprinter(key, shape, self.settings)

    def score(
        self, x: Tensor, principals: Sequence[str], now: float, sent: Tensor | None = None
    ) -> NDArray[np.float64]:
        """Return the scores (n) of inputs `x` (n, *shape) of clients `principals` (n), and count them in the state.

        `now` is the time in seconds of any clock that runs forwards. `sent` are the inputs as the clients sent them, if
        `x` was rounded or scaled; only equal ones are exact repeats. Raises `UsageError` for wrong shapes.
        """
        return self.examine(x, principals, now, sent).scores

    def examine(
        self, x: Tensor, principals: Sequence[str], now: float, sent: Tensor | None = None
    ) -> QueryScores:
        """Return the scores of inputs like `score`, with the findings about each input."""
        if len(principals) != len(x):
            raise UsageError(
                f"{len(x)} inputs have {len(principals)} principals; expected one for each input"
            )
        if not len(x):
            return QueryScores(np.zeros(0), ())
        prints = self.fingerprinter(x, sent)
        named = dict.fromkeys(name for name in principals if name)
        examined: list[tuple[float, QueryDetail]] = []

        def decide(view: StateView) -> None:
            examined.clear()  # a state may call this again after a conflict
            batch = _Batch.of(view, prints, x)
            examined.extend(self._decided(batch, row, principals[row]) for row in range(len(x)))

        if not self.state.exchange(Wanted(prints.hashes, prints.digests, list(named)), now, decide):
            score = np.inf if self.state.fail == "closed" else 0.0
            return QueryScores(np.full(len(x), score), (QueryDetail(lost=True),) * len(x))
        return QueryScores(np.array([s for s, _ in examined]), tuple(detail for _, detail in examined))

    def _decided(self, batch: "_Batch", row: int, principal: str) -> tuple[float, QueryDetail]:
        view, digest = batch.view, batch.prints.digests[row]
        if digest in view.answered:
            return 0.0, QueryDetail(repeat=True)
        detail = self._counted(batch, row)
        score = detail.near_duplicates
        if principal:
            account = view.charge(principal, detail.weight)
            share = account.mass / account.queries
            detail = replace(detail, principal_mass=account.mass, principal_share=share)
            limits = self.settings
            excess = min(account.mass / limits.principal_mass, share / max(limits.principal_share, 1e-9))
            if detail.cluster is not None:
                score = max(score, limits.threshold * excess)
        if score < self.settings.threshold:
            view.answer(digest)
        return score, detail

    def _counted(self, batch: "_Batch", row: int) -> QueryDetail:
        """Count a query in the nearest cluster within the radius, or make a new cluster of it."""
        view, sketch = batch.view, batch.prints.sketches[row]
        within = batch.within(row, self.settings.radius)
        if not within:
            view.add(QueryCluster(next(batch.keys), sketch, 0.0, 1, view.now), batch.hashes[row])
            return _NEW
        distance, nearest = min(within, key=itemgetter(0))
        cluster = view.present(nearest)
        others = sum(view.present(each).mass for _, each in within if each is not nearest)
        # queries that are suspicious anyway need no regression, which is half of the cost
        examined = cluster.mass + others < _SETTLED * self.settings.threshold
        natural = self.fingerprinter.natural(batch.x[row : row + 1]) if examined else None
        rest = distance if natural is None else unexplained(sketch - cluster.leader, natural)
        grown = view.touch(cluster, self.weight(distance, rest, cluster.mass + others))
        return QueryDetail(
            cluster.key, grown.mass + others, grown.members, distance, rest, grown.mass - cluster.mass
        )

    def weight(self, distance: float, unexplained: float, mass: float) -> float:
        """Return the weight of a query at a distance from the first query of its cluster, of which natural changes do
        not explain `unexplained`. `mass` is that of the earlier queries near it.
        """
        limits = self.settings
        allowed = max(limits.noise * limits.radius, limits.natural * distance)
        beyond = (unexplained - allowed) / max(limits.full * limits.radius, 1e-12)
        return float(min(max(beyond, 0.0, limits.faint + limits.growth * mass), 1.0))


@dataclass(frozen=True)
class _Batch:
    """The queries of a batch, and what the state contains about them."""

    view: StateView
    prints: Fingerprints
    x: Tensor
    hashes: list[list[int]]
    """hashes of each query"""
    distances: list[dict[int, float]]
    """for each query that is no exact repeat, the distances to the clusters of earlier batches near it, by key"""
    keys: Iterator[int]
    """keys of new clusters"""

    @classmethod
    def of(cls, view: StateView, prints: Fingerprints, x: Tensor) -> "_Batch":
        hashes = prints.hashes.tolist()
        pairs = [
            (row, each)
            for row, (own, digest) in enumerate(zip(hashes, prints.digests, strict=True))
            if digest not in view.answered  # exact repeats are not compared
            for each in view.near(own)
        ]
        distances: list[dict[int, float]] = [{} for _ in hashes]
        if pairs:
            leaders = np.stack([each.leader for _, each in pairs])
            differences = leaders - prints.sketches[[row for row, _ in pairs]]
            for (row, each), length in zip(pairs, np.linalg.norm(differences, axis=1).tolist(), strict=True):
                distances[row][each.key] = length
        # Keys of one second and of one batch are near each other, so that a state in a file stores and drops
        # neighbouring rows.
        first = int(view.now) % 2**22 << 40 | secrets.randbits(40)
        return cls(view, prints, x, hashes, distances, itertools.count(first))

    def within(self, row: int, radius: float) -> list[tuple[float, QueryCluster]]:
        """Return the clusters within the radius of a query, with their distances."""
        result = []
        for each in self.view.near(self.hashes[row]):
            distance = self.distances[row].get(each.key)
            if distance is None:  # of a cluster that an earlier query of this batch created
                distance = float(np.linalg.norm(each.leader - self.prints.sketches[row]))
            if distance <= radius:
                result.append((distance, each))
        return result


def for_cameras(settings: QuerySettings) -> QuerySettings:
    """Return settings with which nearly equal images of one scene are not suspicious, however many there are: natural
    changes and those up to a quarter of the radius count nothing. Attacks with such changes are not detected either.
    """
    return replace(settings, faint=0.0, growth=0.0, noise=_CAMERA_NOISE)


def fingerprinter(key: bytes, shape: Sequence[int], settings: QuerySettings) -> Fingerprinter:
    """Return the fingerprinter of a query detector with these settings."""
    return Fingerprinter(
        key,
        shape,
        cells=settings.cells,
        tables=settings.tables,
        width=settings.planes,
        bucket=settings.bucket * settings.radius,
    )


def radius_for(
    x: Tensor,
    key: bytes,
    settings: QuerySettings | None = None,
    *,
    queries: int = 100_000,
    false_positives: float = 0.001,
    eps: float = 8 / 255,
) -> float:
    """Return the radius at which about a fraction `false_positives` of benign inputs like `x` (n, *shape) would be
    suspicious among `queries` of them in a half-life.

    `x` are a thousand inputs or more, of which equal ones count once, because exact repeats are not suspicious. It is
    the quantile of the distances of inputs to their k-th nearest neighbour, where k is the threshold, reduced in
    proportion to the number of inputs; or, if that is less, the largest distance between inputs that differ by at most
    `eps` from a common one in each value, because weights are relative to the radius. Raises `UsageError` for fewer
    than two different inputs.
    """
    limits, n = settings or QuerySettings(), len(x)
    x = torch.unique(x, dim=0) if n else x
    if len(x) < 2:
        raise UsageError(
            f"the inputs for the radius of near duplicates contain many equal ones: {len(x)} of {n} are different; "
            "give 1,000 different ones or more"
        )
    prints = fingerprinter(key, x.shape[1:], limits)
    sketches = torch.from_numpy(prints.sketch(x))
    k = min(max(1, round(limits.threshold * len(x) / queries)), len(x) - 1)
    parts = torch.split(sketches, 500)  # bounds the memory of the distances
    exact = "donot_use_mm_for_euclid_dist"  # the faster mode rounds small distances to 0
    distances = (torch.cdist(part, sketches, compute_mode=exact) for part in parts)
    nearest = [each.topk(k + 1, largest=False).values[:, k] for each in distances]
    radius = min(float(torch.cat(nearest).quantile(false_positives)), 2 * eps * math.sqrt(prints.n_features))
    if not radius > 0:
        raise UsageError(
            f"a fraction {false_positives:g} of the inputs for the radius of near duplicates has {k} neighbours at "
            "distance 0, although no inputs are equal; give inputs that differ more, or a radius"
        )
    return radius


def covered_eps(radius: float, shape: Sequence[int], settings: QuerySettings | None = None) -> float:
    """Return the size of the changes of single values that a radius covers: inputs of a shape that differ by at most so
    much from a common one are near duplicates of each other.
    """
    return radius / (2 * math.sqrt(n_features_of(shape, (settings or QuerySettings()).cells)))
