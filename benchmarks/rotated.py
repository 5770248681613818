"""Parameter sets of one small network on MNIST, what rotates among them, and what each kind of attacker still gets.

The network and the settings are those that Generate to Defend was first measured with here: 59,034 parameters, eps 0.1
under Linf. A *case* is one seed of a row: sets that leaked, sets that
serve after them, and surrogates of an attacker who stole nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from time import perf_counter

import safetensors.torch
import torch
from torch import nn

from benchmarks.hardened import dataset
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells
from holdfast.attacks import Transfer
from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.fast_networks import Ensemble
from holdfast.attacks.parts.losses import cross_entropy, margin_loss
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.recipes import SingleStep, Standard
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe
from holdfast.rotation import Basins, Immunise, Members, Task, collect, put, weights_of
from holdfast.rotation.collecting import trained_from_fresh_weights

HELD = 5_000
POINT = 0.01
"""What a draw may lose of the bases' accuracy on held-out images to be let in."""
Sets = Sequence[Classifier]


class Conv(nn.Conv2d):
    """A convolution whose weights begin as large as He et al. have it, and not as small as torch does."""

    def reset_parameters(self) -> None:
        """Weights whose variance is two over what goes in."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.weight)


class Layer(nn.Linear):
    """The same of a linear layer; of the last one, half the variance."""

    def reset_parameters(self) -> None:
        """Weights whose variance is two over what goes in, one where classes come out."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear" if self.out_features == 10 else "relu")


def network(*, small: bool = False) -> Classifier:
    """Two convolutions of 16 and 32 channels, a hidden layer of 32 units: 59,034 parameters, no batch norm.

    `small` weights begin as torch has it, 2.4 times smaller.
    """
    conv, layer = (nn.Conv2d, nn.Linear) if small else (Conv, Layer)
    layers = [
        conv(1, 16, 4, 2, 1), nn.ReLU(), conv(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        layer(1568, 32), nn.ReLU(), layer(32, 10),
    ]  # fmt: skip
    return Classifier(nn.Sequential(*layers), classes=10).eval()


@dataclass(frozen=True)
class Examples:
    """MNIST: what is trained on, what admits, and what judges."""

    train: Batch
    held: Batch
    test: Batch


@cache
def examples() -> Examples:
    """The last 5,000 training images admit."""
    images = DeclaredData(layout="chw")
    place = str(dataset("mnist"))
    train, test = (open_data(place, split=split, expected=images) for split in ("train", "test"))
    whole = train.read(0, len(train))
    rest = len(whole) - HELD
    return Examples(
        whole.take(torch.arange(rest)), whole.take(torch.arange(rest, len(whole))), test.read(0, len(test))
    )


BASINS = Basins(seeds=8, sets=25, every=4, lr=1e-3)
TRAJECTORY = Basins(seeds=1, sets=200, every=4, lr=1e-3)


@dataclass(frozen=True)
class Kind:
    """How the sets of a table are trained, and under which threat they are judged."""

    name: str
    row: str
    """under which its sets are kept"""
    eps: float
    recipe: Recipe
    tail: Recipe
    network: Callable[..., Classifier] = network
    examples: Callable[[], Examples] = examples
    basins: Basins = BASINS
    old: int = 4
    """sets that served and leaked"""
    live: int = 3
    """sets that serve now"""
    own: int = 4
    """surrogates of the thief of nothing"""
    immunise: Immunise = field(default_factory=Immunise)
    guard: bool = True
    """whether what hardens its sets by single steps watches for overfitting, and takes more of them where it comes"""
    attacks: int = 400
    """test images that are attacked"""
    drawn: int = 160
    """sets that are drawn where they are drawn"""

    @property
    def attacked(self) -> Batch:
        """The test images that are attacked."""
        return self.examples().test.take(torch.arange(self.attacks))

    @property
    def threat(self) -> ThreatModel:
        """Linf of that eps."""
        return ThreatModel(Linf(self.eps))

    def single_step(self, how: Training) -> SingleStep:
        """More of what hardens its sets."""
        return single_step(how, guard=self.guard)

    def _begun(self, small: bool) -> Classifier:
        return self.network(small=True) if small else self.network()

    def task(self, *, small: bool = False) -> Task:
        """What every set is trained with."""
        return Task(self._begun(small), self.examples().train, self.threat, self.recipe, self.tail, "own")


_PLAIN = Training(epochs=2, lr=3e-3, averaging="none", weight_decay=0.0)


def single_step(training: Training, *, guard: bool = True) -> SingleStep:
    """FGSM-RS: without a guard as its paper has it, with one the recipe `fgsm-rs`."""
    return SingleStep(noise=1.0, step=1.25, clip=True, guard=guard, training=training)


_RAMPED = replace(_PLAIN, epochs=4, lr=2.5e-3, warmup=0.4)
STANDARD = Kind("standard", "rotation", 0.1, Standard(training=_PLAIN), Standard(training=_PLAIN))
ROBUST = Kind("robust", "rotation-robust", 0.2, single_step(_RAMPED), single_step(_RAMPED))
_BARE = single_step(_RAMPED, guard=False)
UNGUARDED = Kind("unguarded", "rotation-unguarded", 0.2, _BARE, _BARE, guard=False)


def accuracy(model: Classifier, data: Batch) -> float:
    """Share that is right."""
    with torch.no_grad():
        right = [model(some.x).argmax(1) == some.y for some in data.split(1_000)]
    return float(torch.cat(right).float().mean())


def seeds(kind: Kind, seed: int, n: int, *, small: bool = False) -> list[Classifier]:
    """`n` independent runs of a case, kept as they are done."""
    name = f"{kind.name}{' small' if small else ''} {seed} seed"
    return [kept(kind, f"{name} {k}", partial(_seed, kind, seed, k, small=small)) for k in range(n)]


def _seed(kind: Kind, seed: int, k: int, *, small: bool) -> Classifier:
    return trained_from_fresh_weights(kind.task(small=small), Draws(seed).at("run", k))


def kept(kind: Kind, name: str, made: Callable[[], Classifier]) -> Classifier:
    """A model whose weights lie in the cache, made now if they do not."""
    path = RUNS / kind.row / f"{name.replace(' ', '-')}.safetensors"
    if path.is_file():
        return put(kind.network(), safetensors.torch.load_file(path), kind.examples().train)
    model = made()
    _keep(path, weights_of(model))
    return model


def kept_members(row: str, name: str, made: Callable[[], Members]) -> Members:
    """A collection that lies in the cache, made now if it does not."""
    path = RUNS / row / f"{name.replace(' ', '-')}.safetensors"
    if not path.is_file():
        members = made()
        _keep(path, {**members.tensors, "basins": members.basins})
    tensors = safetensors.torch.load_file(path)
    return Members({name: value for name, value in tensors.items() if name != "basins"}, tensors["basins"])


def _keep(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, whole)
    whole.replace(path)


def models(members: Members, rows: Sequence[int], kind: Kind = STANDARD) -> list[Classifier]:
    """Some sets of a collection as models."""
    return [put(kind.network(), members.one(k), kind.examples().train) for k in rows]


def collected(kind: Kind, seed: int, source: str) -> Members:
    """The collection of a case, from `trajectory` or `basins`."""
    made = {"trajectory": TRAJECTORY, "basins": kind.basins}[source]
    name = f"{kind.name} {seed} {source}"
    return kept_members(kind.row, name, lambda: collect(made, kind.task(), rng=Draws(seed).at("collection")))


def admitted(
    drawn: Members, members: Members, kind: Kind = STANDARD
) -> tuple[list[Classifier], torch.Tensor, list[float]]:
    """Draws that lose at most a point of the bases' mean accuracy on held-out images, which (n), and how all did."""
    held, bases = kind.examples().held, members.bases()
    least = mean(accuracy(one, held) for one in models(bases, range(len(bases)), kind)) - POINT
    sets = models(drawn, range(len(drawn)), kind)
    right = [accuracy(one, held) for one in sets]
    let_in = torch.tensor(right) >= least
    return [one for one, fine in zip(sets, let_in.tolist(), strict=True) if fine], let_in, right


@dataclass(frozen=True)
class Momentum:
    """Momentum PGD on the mean of the sources' logits from a random start, no step of which stops at success."""

    steps: int = 12

    def __call__(self, sources: Sets, batch: Batch, threat: ThreatModel, rng: Draws) -> torch.Tensor:
        """Changed inputs."""
        constraint, model = threat.constraint, Ensemble(tuple(sources), sources[0].bounds)
        start = constraint.sample(batch, model.bounds, rng)
        size = 2.5 * constraint.eps / self.steps
        return ascend(
            model, batch, start, cross_entropy, constraint, steps=self.steps, step_size=size, momentum=0.9,
            keep="last",
        )[0]  # fmt: skip


def crafted(sources: Sets, kind: Kind, rng: Draws) -> dict[str, torch.Tensor]:
    """What each attack makes on the sources of the test images that are attacked."""
    batch, threat = kind.attacked, kind.threat
    tuned = Transfer(steps=10, reach=2.5, neighbours=5, around=1.5, diversity=0.5)
    held = replace(threat, surrogates=tuple(sources))
    whole = Ensemble(tuple(sources), sources[0].bounds)
    return {
        "momentum": Momentum()(sources, batch, threat, rng),
        "margin": ascend(
            whole, batch, threat.constraint.sample(batch, whole.bounds, rng), margin_loss, threat.constraint,
            steps=50, step_size=2.5 * kind.eps / 50, keep="last",
        )[0],
        "vmi": tuned(whole, batch, held, rng=rng),
    }  # fmt: skip


def success(target: Classifier, x_adv: torch.Tensor, kind: Kind = STANDARD) -> float:
    """Share of the attacked images, right on the target as they are, that are wrong on it when changed."""
    batch = kind.attacked
    with torch.no_grad():
        right = target(batch.x).argmax(1) == batch.y
        wrong = target(x_adv).argmax(1) != batch.y
    return float((wrong & right).sum() / right.sum().clamp(min=1))


def transfer(sources: Sets, targets: Sets, kind: Kind, rng: Draws) -> tuple[float, float]:
    """Mean success over the targets by momentum PGD alone, and by the attack that does best on them."""
    made = crafted(sources, kind, rng)
    by_attack = {name: mean(success(target, x, kind) for target in targets) for name, x in made.items()}
    return by_attack["momentum"], max(by_attack.values())


def white_box(target: Classifier, kind: Kind, steps: int = 12) -> float:
    """Success of momentum PGD on the target itself."""
    made = Momentum(steps)([target], kind.attacked, kind.threat, Draws(7))
    return success(target, made, kind)


def means(cells: list[Cells]) -> Cells:
    """Means over the seeds of what each says."""
    names = list(dict.fromkeys(name for one in cells for name in one))
    return {name: mean(one[name] for one in cells if name in one) for name in names}


def over_seeds(
    detail: Cells, row: str, seeds: Sequence[int], judges: Mapping[str, Callable[[int], Cells]]
) -> dict[str, Cells]:
    """Means over the seeds of what each judge says, by its name; each part is kept, and put into the detail."""
    cells: dict[str, list[Cells]] = {name: [] for name in judges}
    for seed in seeds:
        for name, judge in judges.items():
            key = f"{name}, seed {seed}"
            detail[key] = part(row, key, partial(judge, seed))
            cells[name].append(detail[key]["measured"])
    return {name: means(measured) for name, measured in cells.items()}


def timed(made: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin = perf_counter()
    made()
    return perf_counter() - begin
