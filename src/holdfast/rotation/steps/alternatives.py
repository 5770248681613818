"""Measures alternatives to a rotation, such as independent seeds, against an attacker with a stolen set and against a
white-box attack.

The alternatives take about the time of a rotation. Static: the set is not swapped. Noise on the weights. Checkpoints of
one run, their mean (a soup, Wortsman et al., arXiv:2203.05482) and samples around it (SWAG, Maddox et al.,
arXiv:1902.02476). Independent seeds. Half an epoch of single-step adversarial fine-tuning (FGSM-RS, Wong et al.,
arXiv:2001.03994), and with as many passes PGD training (Madry et al., arXiv:1706.06083) and diversity as in DVERGE
(Yang et al., arXiv:2009.14720), each starting from the serving set.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.estimate import Estimate
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import PGDTraining, SingleStep, Standard
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe, trained_as
from holdfast.rotation import Distilled, Immunise, Members
from holdfast.rotation.collecting import further, last_of, rows_of
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.contents import collected_members, surrogates
from holdfast.rotation.steps.rotation_request import RotateRequest
from holdfast.rotation.transfer_attacks import TransferAttacker, noisy
from holdfast.statistics.intervals import proportion

NOISE = 0.3
"""Size of the noise on the weights, as a fraction of the root mean square of each tensor."""
# Epochs of the single-step training, the learning rate, and attack steps of the PGD training:
_SHARE, _LR, _INNER = 0.5, 1e-3, 5
_ONE_STEP = SingleStep(noise=1.0, step=1.25, clip=True)
Json = dict[str, Any]


@dataclass
class Alternatives:
    """Measures all alternatives to a rotation on the same inputs with the same few attacks."""

    pool: Pool
    request: RotateRequest
    live: Classifier
    batch: Batch
    threat: ThreatModel
    rng: Draws
    transfer_attacker: TransferAttacker

    def rows(self) -> Iterator[tuple[str, Callable[[], Json | None]]]:
        """Yield the name of each alternative to a rotation, and a function that measures it. The function returns None
        if the pool does not permit the alternative.
        """
        yield "static", lambda: self._row(self.live, self.live, "the serving set is never swapped")
        yield (
            "weight noise",
            lambda: self._row(
                self._noisy(), self.live, f"noise of {NOISE:g} times the root mean square of each tensor"
            ),
        )
        yield "checkpoints of a run", self._checkpoints
        yield "soup", self._soup
        yield "SWAG", self._swag
        yield "independent seeds", self._seeds
        yield (
            "adversarial fine-tuning",
            lambda: self._row(self.tuned, self.live, "half an epoch, one step (FGSM-RS)"),
        )
        yield "PGD training", self._pgd
        yield "DVERGE-like diversity", self._diverse

    @cached_property
    def tuned(self) -> Classifier:
        """The model of the serving set after half an epoch of adversarial fine-tuning."""
        return self._trained(_ONE_STEP, _SHARE)

    def _pgd(self) -> Json:
        share = _SHARE * 2 / (_INNER + 1)  # a single-step update takes two passes
        description = f"as many passes: {share:.2g} of an epoch, {_INNER} steps"
        return self._row(self._trained(PGDTraining(steps=_INNER), share), self.live, description)

    def _diverse(self) -> Json:
        """Half of the passes compute examples, half train on them, together with FGSM-RS if the sets were hardened."""
        batch, n, steps = self.request.training.batch, len(self.request.train), Distilled().steps
        recipe, passes = (_ONE_STEP, 2) if hardened(self.request) else (Standard(), 1)
        share = _SHARE / (passes + 0.5)  # each update has half as many computed examples as others
        crafting = Distilled(examples=max(round(_SHARE * n / steps), 1), steps=steps)
        how = Immunise(share=share, batch=max(batch // 2, 1), lr=_LR, crafting=crafting)
        as_known = trained_as(recipe, Training(batch=batch))
        place = self.rng.at("trained", "diverse")
        trained = how(self.live, [self.live], as_known, self.request.train, self.threat, rng=place)
        description = (
            f"as many passes: {share:.2g} of an epoch, and {crafting.examples:,} inputs distilled from others"
        )
        return self._row(trained, self.live, description)

    def _trained(self, recipe: Recipe, share: float) -> Classifier:
        """The serving set, trained further for part of an epoch."""
        training = self.request.training
        how = further(Training(batch=training.batch), 1, _LR, "cycle")
        data, place = self.request.train, self.rng.at("trained", type(recipe).__name__)
        some = rows_of(data, max(round(share * len(data)), 1), place.at("data"))
        return last_of(
            trained_as(recipe, how), deepcopy(self.live).requires_grad_(), some, self.threat, place
        )

    def _noisy(self) -> Classifier:
        assert isinstance(self.live.net, torch.nn.Module)
        moved = noisy(self.live.net, NOISE, self.rng.at("noise"))
        return self.request.of_weights(dict(moved.named_parameters()))

    def _checkpoints(self) -> Json | None:
        if self._run is None:
            return None
        stolen, serving = (self.request.of_weights(self._run.one(k)) for k in (0, -1))
        return self._row(
            serving, stolen, f"{len(self._run)} sets of a run; the first was stolen, the last serves"
        )

    def _soup(self) -> Json | None:
        if self._run is None:
            return None
        stolen = self.request.of_weights(self._run.one(0))
        return self._row(self.request.of_weights(self._run.bases().one(0)), stolen, "the mean of those sets")

    def _swag(self) -> Json | None:
        """A sample around the mean of the run, and an attacker with another sample."""
        if self._run is None:
            return None
        samples = []
        for k in range(2):
            weights = {}
            for name, value in self._run.tensors.items():
                noise = self.rng.at("swag", k, name).normal(torch.arange(value[0].numel()))
                weights[name] = value.mean(0) + value.std(0) * noise.view(value[0].shape).to(value)
            samples.append(self.request.of_weights(weights))
        return self._row(samples[0], samples[1], "samples around their mean with their standard deviation")

    def _seeds(self) -> Json:
        models = surrogates(self.pool, self.request)
        return self._row(models[0], models[1], "a set of another training run than the stolen one serves")

    @cached_property
    def _run(self) -> Members | None:
        """The sets of the first run; None if it has only one."""
        members = collected_members(self.pool)
        rows = (members.basins == members.basins[0]).nonzero()[:, 0]
        return members.take(rows) if len(rows) > 1 else None

    def _row(self, serves: Classifier, stolen: Classifier, message: str) -> Json:
        """Clean accuracy of `serves`, and the success rates on it of examples computed on `stolen` and on itself."""
        right = _right(serves, self.batch)
        clean, correct = proportion(right), self.batch.take(right)
        if not len(correct):
            return {
                "clean_accuracy": share_json(clean),
                "stolen_set": None,
                "white_box": None,
                "message": message,
            }
        from_stolen = self._worst(serves, stolen, correct)
        white = from_stolen if stolen is serves else self._worst(serves, serves, correct)
        return {
            "clean_accuracy": share_json(clean),
            "stolen_set": share_json(from_stolen),
            "white_box": share_json(white),
            "message": message,
        }

    def _worst(self, serves: Classifier, source: Classifier, examples_to_attack: Batch) -> Estimate:
        examples = self.transfer_attacker.crafted(
            [source], examples_to_attack, self.threat, rng=self.rng.at("instead")
        )
        broken = [~_right(serves, examples_to_attack.at(x)) for x in examples.values()]
        return max((proportion(mask) for mask in broken), key=lambda share: share.value)


def share_json(share: Estimate) -> Json:
    """Return a fraction with its confidence interval as JSON."""
    return {"value": share.value, "low": share.low, "high": share.high, "n": share.n}


def hardened(request: RotateRequest) -> bool:
    """Return whether the parameter sets of a pool were trained against attacks."""
    return not isinstance(request.candidate.recipe, Standard)


def doubt(alternatives: Mapping[str, Json | None], request: RotateRequest, stolen_share: Json | None) -> Json:
    """Return the doubt that half an epoch of adversarial fine-tuning protects a model better than rotation, as JSON.

    `alternatives` are the measured alternatives, and `stolen_share` is the success rate of an attacker with one stolen
    set. The doubt is raised if the sets were not trained against attacks.
    """
    tuned, static = alternatives["adversarial fine-tuning"], alternatives["static"]
    assert tuned is not None and static is not None
    if tuned["stolen_set"] is None or static["white_box"] is None:
        message = "the serving set, or the fine-tuned one, classifies no input correctly"
        return {"state": "not measured", "statistic": None, "threshold": None, "n": 0, "message": message}
    rotated_text = "an unmeasured share" if stolen_share is None else f"{100 * stolen_share['value']:.1f} %"
    white_box_percent = 100 * static["white_box"]["value"]
    message = (
        "after half an epoch of adversarial fine-tuning of the serving set, an attacker with the old set breaks "
        f"{100 * tuned['stolen_set']['value']:.1f} % and a white-box attack {100 * tuned['white_box']['value']:.1f} %; "
        f"with rotation, an attacker with one stolen set breaks {rotated_text} and the same white-box attack "
        f"{white_box_percent:.1f} %"
    )
    state = "clear" if hardened(request) else "raised"
    if state == "raised":
        message = f"the sets were trained by {request.candidate.name}, which does not train against attacks: {message}"
    return {
        "state": state,
        "statistic": static["white_box"]["value"],
        "threshold": tuned["white_box"]["value"],
        "n": static["white_box"]["n"],
        "message": message,
    }


@torch.no_grad()
def _right(model: Classifier, batch: Batch) -> torch.Tensor:
    return torch.cat([model(some.x).argmax(1) == some.y for some in batch.split(1_000)])
