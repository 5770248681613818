"""Stateful detector of query-based attacks: it counts queries that are near-duplicates of earlier queries."""

import itertools
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from annotated_types import Ge, Gt
from numpy.typing import NDArray
from torch import Tensor

from holdfast.core.batch import Batch, Lookup
from holdfast.core.constraints import Norm, allowed
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.outputs import REFUSED
from holdfast.core.types import Fraction, Ids, Inputs, Logits, NonNegative, Positive
from holdfast.guard.detectors.fingerprints import (
    Fingerprinter,
    Fingerprints,
    Floats,
    Hashes,
    n_features_of,
    unexplained,
)

Fail = Literal["open", "closed"]
"""what happens while the state cannot be reached: `open` allows all queries, `closed` refuses them"""

BUCKET = 32
"""largest number of clusters for one hash; the oldest are dropped, so that the cost of a query is bounded"""


@dataclass(frozen=True)
class QueryCluster:
    """Queries near each other. `key` identifies the cluster in its state."""

    key: int
    leader: Floats
    """sketch (64) of the first query"""
    mass: float
    """weighted number of the other queries, at the time `seen`"""
    members: int
    """number of queries, exact repeats not counted"""
    seen: float
    """time of the last query, in seconds of the state's clock"""


@dataclass(frozen=True)
class Account:
    """What is stored about one principal (client). Both numbers halve in each half-life."""

    queries: float = 0.0
    """number of queries, exact repeats not counted"""
    mass: float = 0.0
    """weighted number of these that were near earlier queries of any principal"""
    seen: float = 0.0
    """time of the last query, in seconds of the state's clock"""


@dataclass(frozen=True)
class Wanted:
    """What a batch of n queries needs from the state."""

    hashes: Hashes
    """(n, tables)"""
    digests: Sequence[int]
    """(n)"""
    principals: Sequence[str]
    """(n) names of the clients; an empty name has no account"""


@dataclass
class StateView:
    """The part of a state that a batch of queries needs. The detector changes it; the state stores the changes."""

    now: float
    """time of the state's clock in seconds, which never goes backwards"""
    half_life_s: float
    clusters: dict[int, QueryCluster]
    buckets: dict[int, list[int]]
    """keys of the clusters that have a hash"""
    answered: set[int]
    """digests of the batch that were answered before"""
    accounts: dict[str, Account]
    added: dict[int, list[int]] = field(default_factory=dict)
    """hashes of each new cluster"""
    touched: dict[int, tuple[float, int]] = field(default_factory=dict)
    """mass and number of queries that each cluster gained"""
    charged: dict[str, tuple[float, float]] = field(default_factory=dict)
    """number of queries and mass that each account gained"""
    answers: list[int] = field(default_factory=list)
    """digests that are answered now for the first time"""
    dropped: list[tuple[int, int]] = field(default_factory=list)
    """hashes and keys of clusters that are no longer stored under them"""

    def decay(self, since: float) -> float:
        """Return the factor by which a mass has shrunk since a time."""
        return float(0.5 ** (max(0.0, self.now - since) / self.half_life_s))

    def near(self, hashes: Sequence[int]) -> list[QueryCluster]:
        """Return the clusters that have one of these hashes, with their masses at the times of their last queries."""
        if self.buckets.keys().isdisjoint(hashes):  # as those of most queries
            return []
        keys = dict.fromkeys(key for each in hashes for key in self.buckets.get(each, ()))
        return [self.clusters[key] for key in keys if key in self.clusters]

    def present(self, cluster: QueryCluster) -> QueryCluster:
        """Return a cluster with its mass at the present time."""
        return replace(cluster, mass=cluster.mass * self.decay(cluster.seen), seen=self.now)

    def add(self, cluster: QueryCluster, hashes: Sequence[int]) -> None:
        """Store a new cluster under its hashes. Where there are too many, the least recently used one is dropped."""
        self.clusters[cluster.key] = cluster
        self.added[cluster.key] = list(dict.fromkeys(hashes))
        for each in self.added[cluster.key]:
            bucket = self.buckets.get(each)
            if bucket is None:  # as for most hashes
                self.buckets[each] = [cluster.key]
                continue
            if len(bucket) >= BUCKET:
                # a key without a cluster is that of one that was dropped meanwhile
                oldest = min(
                    bucket, key=lambda key: self.clusters[key].seen if key in self.clusters else -math.inf
                )
                bucket.remove(oldest)
                self.dropped.append((each, oldest))
            bucket.append(cluster.key)

    def touch(self, cluster: QueryCluster, mass: float) -> QueryCluster:
        """Count one more query of a cluster, with a weight `mass`, and return the cluster."""
        grown = replace(cluster, mass=cluster.mass + mass, members=cluster.members + 1)
        self.clusters[cluster.key] = grown
        before = self.touched.get(cluster.key, (0.0, 0))
        self.touched[cluster.key] = before[0] + mass, before[1] + 1
        return grown

    def charge(self, principal: str, mass: float) -> Account:
        """Count one more query of a principal, with a weight `mass`, and return its account."""
        before = self.accounts.get(principal, Account(seen=self.now))
        factor = self.decay(before.seen)
        account = Account(before.queries * factor + 1, before.mass * factor + mass, self.now)
        self.accounts[principal] = account
        queries, total = self.charged.get(principal, (0.0, 0.0))
        self.charged[principal] = queries + 1, total + mass
        return account

    def answer(self, digest: int) -> None:
        """Record that a query is answered, so that its exact repeats are not counted."""
        self.answered.add(digest)
        self.answers.append(digest)


@dataclass(frozen=True)
class StateLimits:
    """How much a state stores, and for how long."""

    half_life_s: float = 86_400.0
    """seconds in which masses halve; entries are dropped ten half-lives after their last query"""
    clusters: int = 200_000
    """largest number of clusters; the least recently used are dropped"""
    digests: int = 400_000
    """largest number of digests of answered queries; the oldest are dropped"""
    accounts: int = 100_000
    """largest number of principals; the least recently used are dropped"""
    heaviest: float = 80.0
    """largest mass of a cluster, which bounds the time until an attacked image is accepted again"""

    def __post_init__(self) -> None:
        if min(self.half_life_s, self.clusters, self.digests, self.accounts, self.heaviest) <= 0:
            raise UsageError(
                f"{self} has a limit that is not positive; expected positive limits of the state"
            )

    @property
    def lifetime_s(self) -> float:
        """Seconds after which an unused entry is dropped, when its mass is a thousandth."""
        return 10 * self.half_life_s


@dataclass(frozen=True)
class Health:
    """Whether the state can be reached, for metrics and the audit."""

    reachable: bool = True
    losses: int = 0
    """number of times that the state was lost"""
    emptied: int = 0
    """number of times that the state was reachable but its content had been removed"""
    error: str = ""
    """the last error"""


class QueryState(Protocol):
    """Protocol of a state of the query detector, which one process or many processes use."""

    @property
    def fail(self) -> Fail:
        """What happens while the state cannot be reached."""

    @property
    def health(self) -> Health:
        """Whether the state can be reached, and how often it was lost."""

    def exchange(self, wanted: Wanted, now: float, decide: Callable[[StateView], None]) -> bool:
        """In one transaction, read what a batch of queries needs, call `decide` with it, and store its changes.

        `now` is the time of the caller's clock in seconds. Returns False, after reporting, if the state cannot be
        reached; nothing is stored then, and `decide` may have been called.
        """

    def close(self) -> None:
        """Release files and connections."""


_LONGEST_STEP_S = 3600.0  # longer pauses without a query are rare, and a clock that is set jumps by more


@dataclass
class SteadyClock:
    """A clock of one process that follows the clock of its caller but neither goes backwards nor jumps.

    A step backwards counts as no time, and a step forwards as at most an hour. Several processes with a common state
    take the maximum of their clocks.
    """

    _last: float | None = None
    _steady: float = 0.0

    def at(self, now: float, stored: tuple[float, float] | None) -> float:
        """Return the time of the state for the time `now` of the caller. `stored` are the callers' time and the state's
        time that were stored last, or None in a new state.
        """
        wall, steady = stored or (now, 0.0)
        last = wall if self._last is None else self._last
        base = steady if self._last is None else self._steady
        passed = min(max(now - last, 0.0), _LONGEST_STEP_S)
        self._last, self._steady = now, max(steady, base + passed)
        return self._steady


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
    """Stateful query detector for inputs of one shape, or for rows of symbols if `shape` is None.

    `key` is secret, the same for all processes with a common state, and changes the meaning of the state: use a new
    state with a new key.

    Cost of a query, for small images and with the state in SQLite: about 0.35 ms of CPU time, and a third of it in
    batches of 8 queries. Near duplicates cost as much again, until their score is far above the threshold.
    """

    def __init__(
        self,
        key: bytes,
        state: QueryState,
        shape: Sequence[int] | None,
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


def fingerprinter(key: bytes, shape: Sequence[int] | None, settings: QuerySettings) -> Fingerprinter:
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
    symbols: bool = False,
) -> float:
    """Return the radius at which about a fraction `false_positives` of benign inputs like `x` (n, *shape) would be
    suspicious among `queries` of them in a half-life.

    `x` are a thousand inputs or more, of which equal ones count once, because exact repeats are not suspicious. It is
    the quantile of the distances of inputs to their k-th nearest neighbour, where k is the threshold, reduced in
    proportion to the number of inputs; or, if that is less, the largest distance between inputs that differ by at most
    `eps` from a common one in each value, because weights are relative to the radius. With `symbols`, inputs are rows
    of symbols, and `eps` is the share of their runs, see `covered_eps`. Raises `UsageError` for fewer than two
    different inputs.
    """
    limits, n = settings or QuerySettings(), len(x)
    x = torch.unique(x, dim=0) if n else x
    if len(x) < 2:
        raise UsageError(
            f"the inputs for the radius of near duplicates contain many equal ones: {len(x)} of {n} are different; "
            "give 1,000 different ones or more"
        )
    shape = None if symbols else x.shape[1:]
    prints = fingerprinter(key, shape, limits)
    sketches = torch.from_numpy(prints.sketch(x))
    k = min(max(1, round(limits.threshold * len(x) / queries)), len(x) - 1)
    parts = torch.split(sketches, 500)  # bounds the memory of the distances
    exact = "donot_use_mm_for_euclid_dist"  # the faster mode rounds small distances to 0
    distances = (torch.cdist(part, sketches, compute_mode=exact) for part in parts)
    nearest = [each.topk(k + 1, largest=False).values[:, k] for each in distances]
    radius = min(float(torch.cat(nearest).quantile(false_positives)), radius_covering(eps, shape, limits))
    if not radius > 0:
        raise UsageError(
            f"a fraction {false_positives:g} of the inputs for the radius of near duplicates has {k} neighbours at "
            "distance 0, although no inputs are equal; give inputs that differ more, or a radius"
        )
    return radius


def radius_covering(eps: float, shape: Sequence[int] | None, settings: QuerySettings) -> float:
    """Return the radius at which inputs that differ by at most `eps` from a common one are near duplicates of each
    other. `eps` is the size of changes of single values or, without a `shape`, the share of the runs of symbols that
    are not those of the common one.
    """
    if shape is None:
        return 2 * math.sqrt(eps)  # two inputs have all but 2 eps of their runs in common
    return 2 * eps * math.sqrt(n_features_of(shape, settings.cells))


def covered_eps(radius: float, shape: Sequence[int] | None, settings: QuerySettings | None = None) -> float:
    """Return the size of the changes that a radius covers; it is the inverse of `radius_covering`."""
    if shape is None:
        return (radius / 2) ** 2
    return radius / radius_covering(1.0, shape, settings or QuerySettings())


@dataclass
class Screened:
    """Model that rejects the queries of a batch of examples on which a query detector fires, and records when each
    example was first broken and first rejected. Without `detector`, it records only.

    A rejected query has the outputs `holdfast.core.outputs.REFUSED`. Inputs that `model` rejects by a detector of its
    own are rejected as well.
    """

    model: Classifier
    batch: Batch
    norm: Norm
    detector: QueryDetector | None = None
    principal: str = ""
    """name of the client; with an empty one, the detector counts queries over all clients only, as for an attacker with
    a new client for each query"""
    alone: bool = False
    """whether inputs that `model` rejects by a detector of its own are answered nevertheless"""
    queries: Tensor = field(init=False)
    """number of queries of each example (n,), int64"""
    broken_at: Tensor = field(init=False)
    """number of the first query of each example that was accepted and misclassified (n,); 0 if there is none"""
    rejected_at: Tensor = field(init=False)
    """number of the first query of each example that was rejected (n,); 0 if there is none"""

    def __post_init__(self) -> None:
        self.queries, self.broken_at, self.rejected_at = (torch.zeros_like(self.batch.ids) for _ in range(3))
        self._lookup = Lookup(self.batch.ids)

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs."""
        return self.model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes) of the queries; those of rejected ones are `REFUSED`."""
        rows = self._lookup.rows(self.batch.ids if ids is None else ids)
        with torch.no_grad():
            logits = self.model(x)
        rejected = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if self.model.rejects:
            rejected = (logits[:, -1] > logits[:, :-1].amax(1)) & (not self.alone)
            logits = logits[:, :-1]
        if self.detector is not None:
            low, high = self.bounds.like(x)
            scaled = ((x - low) / (high - low)).float()
            scores = self.detector.score(scaled, [self.principal] * len(x), 0.0, x)
            fired = torch.from_numpy(scores >= self.detector.settings.threshold)
            rejected = rejected | fired.to(x.device)
        queried = self.batch.take(rows)
        wrong = ~(margin(logits, queried) > 0) & ~rejected & allowed(self.norm, x, queried.x, self.bounds)
        for row, is_wrong, is_rejected in zip(rows.tolist(), wrong.tolist(), rejected.tolist(), strict=True):
            self.queries[row] += 1
            if is_wrong and not self.broken_at[row]:
                self.broken_at[row] = self.queries[row]
            if is_rejected and not self.rejected_at[row]:
                self.rejected_at[row] = self.queries[row]
        answers: Logits = logits.masked_fill(rejected[:, None], REFUSED)
        return answers
