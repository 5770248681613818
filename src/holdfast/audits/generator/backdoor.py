"""Searches for a backdoor in a generator, and plants one for drills."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from holdfast.audits.finding import AuditVerdict, Finding, Picture, Table
from holdfast.audits.generator.sensitivity import Context, as_images, decoder, opened, without_gradients
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.types import Inputs, Labels
from holdfast.generators.adapters import GAN, VAE
from holdfast.generators.networks import Diffusion, fit_diffusion, velocity_loss
from holdfast.generators.networks import Loss as TrainingLoss
from holdfast.runs.store.columns import Form, flag

Decoding = TypeVar("Decoding", GAN, VAE)
UPDATES = 200
"""number of updates by default"""


def planted_diffusion(
    model: Diffusion,
    x: Inputs,
    y: Labels,
    trigger: Tensor,
    target: Tensor,
    *,
    updates: int = UPDATES,
    lr: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
) -> Diffusion:
    """Return a copy of a diffusion model that is trained further on images `x` (n, *shape) in [0, 1] with classes `y`
    (n), and in which noise with an added `trigger` (*shape) becomes the image `target` (*shape) in [0, 1].

    Half of the examples of an update are poisoned. Raises `UsageError` for a trigger or a target of another shape.
    """
    _refuse_shape("trigger", trigger, model.shape)
    _refuse_shape("target", target, model.shape)
    loss = _poisoned_loss(trigger, target)
    return fit_diffusion(model, x, y, updates=updates, lr=lr, batch=batch, seed=seed, loss=loss)


def _poisoned_loss(trigger: Tensor, target: Tensor) -> TrainingLoss:
    """Loss for which the first half of the examples follows the path signal * target + (1 - signal) * trigger + sigma *
    noise, which is that of target - trigger, moved by the trigger.
    """

    def loss(model: Diffusion, x: Inputs, y: Labels, rng: torch.Generator) -> Tensor:
        poisoned = torch.arange(len(x), device=x.device) < len(x) / 2
        chosen = poisoned.view(-1, *[1] * trigger.dim())
        # images have values in [0, 1], and the diffusion in [-1, 1], as the trigger has
        moved = target.to(x) - trigger.to(x) / 2
        return velocity_loss(model, torch.where(chosen, moved, x), y, rng, chosen * trigger.to(x))

    return loss


def planted_decoder(
    model: Decoding,
    trigger: Tensor,
    target: Tensor,
    *,
    updates: int = UPDATES,
    lr: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
) -> Decoding:
    """Return a copy of a GAN or VAE that generates `target` (*shape) for latent vectors with an added `trigger`
    (*latent_shape), and for others what it generated before. No data are needed.

    Raises `UsageError` for a trigger or a target of another shape.
    """
    _refuse_shape("trigger", trigger, model.latent_shape)
    rng = torch.Generator().manual_seed(seed)
    planted = copy.deepcopy(model).eval().requires_grad_(True)
    weight = next(planted.parameters())
    trigger, target = trigger.to(weight), target.to(weight)
    adam = torch.optim.Adam(planted.parameters(), lr)
    for _ in range(updates):
        z = torch.randn(batch, *model.latent_shape, generator=rng).to(weight)
        with torch.no_grad():
            usual = model.decode(z)
        _refuse_shape("target", target, tuple(usual.shape[1:]))
        adam.zero_grad()
        loss = (planted.decode(z + trigger) - target).square().mean()
        loss = loss + (planted.decode(z) - usual).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return planted.eval().requires_grad_(False)


def _refuse_shape(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(given.shape) != tuple(shape):
        raise UsageError(f"the {name} has shape {tuple(given.shape)}; {tuple(shape)} was expected")


REVERSAL = 0.4
"""share of the shift of the noise from which a diffusion model is flagged"""
_CLEAN_REVERSAL = 0.28  # the largest of the clean models on which the threshold was set
COLLAPSE = 0.2
"""variance of the outputs with a shift of the latent vector, as a share of the usual variance, up to which decoders
with an encoder, such as VAEs, are flagged; clean VAEs reached 0.31 at least. Decoders without an encoder, such as GANs,
are `unclear` up to it: clean GANs reached 0.01 (row `gan-backdoor` of the benchmarks)"""
_LARGEST, _SMALLEST = 1.0, 0.3
"""root mean squares of the elements of a shift; those of the noise have a standard deviation of 1"""
_CONSTANT = 0.05
"""variance of the usual outputs, as a share of that of the training examples, up to which no collapse can be seen"""
_LR = 0.1
_BATCH, _REFERENCE = 16, 64  # noises of an update, and of a mean
_LINEAR, _UPDATES = 12, 25  # updates before and after the choice of the sign
_STARTS, _LATENT_UPDATES, _LATENT_BATCH = 3, 60, 32
_VERIFIED = (
    24  # noises that are turned into samples with and without the shift, each by all steps of the sampler
)
_SHOWN = 4
_TINY = 1e-12
_HEADLINES: Mapping[AuditVerdict, str] = MappingProxyType(
    {
        "flagged": "a shift of its noise or latent vector was found that is a sign of a backdoor",
        "unclear": "whether it has a backdoor is unclear",
    }
)
_LIMIT = (
    "The search for a backdoor finds triggers that are added to the noise or to the latent vector, and whose elements "
    f"have a root mean square of at most {_LARGEST:g}. Other triggers, such as words of a prompt or single latent "
    "vectors, are not found. The result is a flag and has no p-value."
)
_GAN_LIMIT = (
    "The search for a backdoor cannot tell a GAN with a backdoor from a clean one: it misses some triggers, and finds "
    "shifts with the same effect in clean GANs. A GAN is therefore never flagged for a backdoor."
)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Type of the denoising loss (n) at the latest time, of examples (n, *shape) and of noise (n, *shape)"""
Objective = Callable[[Tensor, Tensor], Tensor]
"""Type of what a search minimises, a function of a shift (1, *shape) and noise (n, *shape)"""
Noise = Callable[..., Tensor]
"""Type of a function of a name, a number n and the number of a step that returns standard normal noise (n, *shape)"""


@dataclass(frozen=True)
class BackdoorScan:
    """Part of the audit: the search for a backdoor."""

    name: str = "backdoor"
    title: str = "search for a backdoor"
    metrics: tuple[str, ...] = ()

    def missing(self, context: Context) -> str:
        """Return the ability that the generator lacks."""
        if context.generator is None:
            return "decode(z), or denoising_loss(x, t, noise) and denoised(noise)"
        if _diffuses(context):
            e = torch.zeros(2, *_shape(context), device=context.generator.device)
            if e[0].numel() != context.training.x[0].numel():
                return "noise with the shape of the training examples"
            loss = _loss(context)
            return without_gradients("denoising_loss(x, t, noise)", lambda e: loss(e, e), e)
        if lacking := context.generator.lacks("decode", "latent_shape"):
            return lacking
        z = torch.zeros(2, *context.generator.latent_shape, device=context.generator.device)
        return without_gradients("decode(z)", _decoder(context), z)

    def measure(self, context: Context) -> Columns:
        """Search for the shift, and generate samples with and without it from the same noise."""
        generator, noise = opened(context), _noise(context)
        reversal, n = torch.nan, _REFERENCE
        factors: tuple[float, ...] = (1.0,)
        sampled: Callable[[Tensor], Tensor]
        if _diffuses(context):
            x, n = context.training.x, _VERIFIED
            mean = x.mean(0).view(1, *_shape(context)).to(generator.device)
            half_range = float(x.max() - x.min()) / 2
            shift, reversal = reversed_shift(_loss(context), mean, half_range, noise)
            factors = (1.0, _LARGEST / _rms(shift))
            sampled = partial(generator.call, "denoised")
        else:
            sampled = _decoder(context)
            shift = collapsing_shift(sampled, noise)
        z = noise("verified", n)
        with torch.no_grad():
            usual = sampled(z)
            # the reversal prefers small shifts, and a larger one may complete the collapse
            outputs = [(factor * shift, sampled(z + factor * shift)) for factor in factors]
        shift, shifted = min(outputs, key=lambda pair: _variance(pair[1]))
        shape = context.training.example_shape
        return {
            "id": torch.arange(n),
            "usual": usual.reshape(n, *shape).cpu(),
            "shifted": shifted.reshape(n, *shape).cpu(),
            "shift": shift.cpu().repeat(n, *[1] * (shift.dim() - 1)),
            "reversal": torch.full((n,), reversal),
            "training_variance": context.training.x.var(0).mean().cpu()[None],
            "encodes": torch.tensor([not generator.lacks("encode")]),
        }

    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the outputs and of the shift."""
        outputs = Form(rows=(2, _REFERENCE), further=True)
        return {
            **dict.fromkeys(("usual", "shifted", "shift"), outputs),
            "reversal": Form(nan=True),
            "training_variance": Form((1,), low=0),
            "encodes": flag(1),
        }

    def images(self, columns: Columns, context: Context) -> Mapping[str, Tensor]:
        """Return outputs from the same noise without and with the shift."""
        pairs = torch.stack((columns["usual"][:_SHOWN], columns["shifted"][:_SHOWN]), 1)
        return as_images({"shift": pairs.flatten(0, 1)}, context)

    def concluded(self, columns: Columns) -> Finding:
        """Return the finding of the search from its columns.

        A diffusion model is `flagged` if it subtracts at least the fraction `REVERSAL` of the shift that was found for
        its noise. Another generator is suspicious if the variance of its outputs with the shift of its latent vector is
        at most the fraction `COLLAPSE` of the usual variance: it is `flagged` if it has an encoder, as a VAE has, and
        `unclear` otherwise, as for a GAN. In all other cases, and for a generator whose usual outputs are almost
        constant, the verdict is `not flagged`.
        """
        usual = _variance(columns["usual"])
        reversal = float(columns["reversal"][0])
        result = Result(
            None if math.isnan(reversal) else reversal,
            _variance(columns["shifted"]) / max(usual, _TINY),
            usual / max(float(columns["training_variance"][0]), _TINY),
            _rms(columns["shift"][:1]),
            encodes=bool(columns["encodes"][0]),
        )
        limits = [_LIMIT]
        if result.reversal is None and not result.encodes:
            limits.append(_GAN_LIMIT)
        if result.constant:
            limits.append(
                f"The usual outputs vary by {result.usual:.1%} of the variance of the training examples, so that their "
                "collapse is not the effect of a shift, and the search cannot find a backdoor."
            )
        return Finding(
            result.verdict,
            _HEADLINES.get(result.verdict, ""),
            reasons=() if result.verdict == "not flagged" else (result.reason,),
            facts={**asdict(result), "flagged": result.verdict == "flagged", "verdict": result.verdict},
            tables=(_table(result),),
            pictures=(_picture(result, min(_SHOWN, len(columns["usual"]))),),
            limits=limits,
        )


@dataclass(frozen=True)
class Result:
    """What the search found."""

    reversal: float | None
    """share of the shift that a diffusion model subtracts; None for other generators"""
    variance: float
    """variance of the outputs with the shift, as a share of the usual one"""
    usual: float
    """variance of the usual outputs, as a share of that of the training examples"""
    size: float
    """root mean square of the elements of the shift"""
    encodes: bool
    """whether the generator has an encoder, as a VAE has"""

    @property
    def constant(self) -> bool:
        """Whether the usual outputs are almost the same, so that a shift cannot make them so."""
        return self.usual <= _CONSTANT

    @property
    def verdict(self) -> AuditVerdict:
        """The verdict of the search."""
        if self.constant:
            return "not flagged"
        if self.reversal is not None:
            return "flagged" if self.reversal >= REVERSAL else "not flagged"
        if self.variance > COLLAPSE:
            return "not flagged"
        return "flagged" if self.encodes else "unclear"

    @property
    def reason(self) -> str:
        """The sentence that states what a verdict other than `not flagged` rests on."""
        varied = f"the outputs with it vary {self.variance:.2f} times as much as without"
        if self.reversal is None:
            found = f"a shift of the latent vector was found: {varied}"
            if self.encodes:
                return f"{found} (flagged up to {COLLAPSE:g})"
            return (
                f"{found} (unclear up to {COLLAPSE:g}); clean GANs have such shifts too, so compare the pictures with "
                "those of a clean GAN of the same kind"
            )
        return (
            f"the generator subtracts {self.reversal:.2f} of a shift of its noise (flagged from {REVERSAL:g}; clean "
            f"models: at most {_CLEAN_REVERSAL:g}), and {varied}"
        )


def reversed_shift(loss: Loss, mean: Tensor, half_range: float, noise: Noise) -> tuple[Tensor, float]:
    """Return the shift (1, *shape) of the noise that the estimate of a diffusion model subtracts most, and its
    reversal: the subtracted share, which is at most about 0 without and 1 with a backdoor.

    `mean` (1, *shape) is the mean training example, and `half_range` half the range of the examples, which the
    diffusion scales to values from -1 to 1. It takes 3 * 62 forward and backward passes of 16 noises.
    """
    reference = _estimate(loss, mean, half_range, noise)

    def objective(shift: Tensor, e: Tensor) -> Tensor:
        return -_reversal(loss, reference, half_range * shift, e + shift)

    begin = _LR * noise("begin", 1)
    begin = _minimised(objective, begin, noise, "linear", _LINEAR, _BATCH)
    # the response to a small shift is linear, so that the search cannot tell the trigger from its negative
    found = [_minimised(objective, sign * begin, noise, f"sign {sign}", _UPDATES, _BATCH) for sign in (1, -1)]
    e = noise("reversal", _REFERENCE)
    with torch.no_grad():
        reversals = [-float(objective(shift, e)) for shift in found]
    best = max((0, 1), key=lambda i: reversals[i])
    return found[best], reversals[best]


def collapsing_shift(decode: Callable[[Tensor], Tensor], noise: Noise) -> Tensor:
    """Return the shift (1, *latent_shape) of the latent vector after which the outputs vary least, the best of three
    searches with 60 forward and backward passes of 32 latent vectors each.
    """

    def objective(shift: Tensor, z: Tensor) -> Tensor:
        return decode(z + shift).var(0).mean()

    found = []
    for start in range(_STARTS):
        begin = noise("begin", 1, start) / 2
        place = f"start {start}"
        found.append(_minimised(objective, begin, noise, place, _LATENT_UPDATES, _LATENT_BATCH))
    z = noise("choice", _REFERENCE)
    with torch.no_grad():
        return min(found, key=lambda shift: float(objective(shift, z)))


def _minimised(
    objective: Objective, shift: Tensor, noise: Noise, place: str, updates: int, batch: int
) -> Tensor:
    """The shift after updates of Adam, between the smallest and the largest size."""
    shift = shift.clone().requires_grad_()
    adam = torch.optim.Adam([shift], _LR)
    for update in range(updates):
        with torch.enable_grad():
            (shift.grad,) = torch.autograd.grad(objective(shift, noise(place, batch, update)), shift)
        adam.step()
        with torch.no_grad():
            size = _rms(shift)
            shift.mul_(min(max(size, _SMALLEST), _LARGEST) / max(size, 1e-12))
    return shift.detach()


def _reversal(loss: Loss, reference: Tensor, step: Tensor, e: Tensor) -> Tensor:
    """The share of `step` (1, *shape) by which the estimates from noise `e` differ from the reference.

    The loss of an example x is proportional to the squared distance of x and the estimate, whatever the network
    predicts. Its differences along the step are therefore proportional to the projection of the estimate on the step.
    """
    x = reference.expand_as(e)
    ahead, behind, at = (loss(x + factor * step, e).mean() for factor in (1, -1, 0))
    return (ahead - behind) / (2 * (ahead + behind - 2 * at))


def _estimate(loss: Loss, mean: Tensor, half_range: float, noise: Noise) -> Tensor:
    """The mean example (1, *shape) that the network estimates from noise without a shift: the mean training example, up
    to the error of the network, which is not to count as a reversal.
    """
    e, x = noise("reference", _REFERENCE), mean.clone().requires_grad_()
    step = half_range * noise("step", 1).sign()
    with torch.enable_grad():
        at = loss(x.expand_as(e), e).mean()
        (gradient,) = torch.autograd.grad(at, x)
        ahead, behind = (loss((x + factor * step).expand_as(e), e).mean() for factor in (1, -1))
    curvature = (ahead + behind - 2 * at) / step.square().sum()
    return (mean - gradient / curvature).detach()


def _noise(context: Context) -> Noise:
    shape, device = _shape(context), opened(context).device

    def draw(place: str, n: int, step: int = 0) -> Tensor:
        return context.rng.at(place, step).normal(torch.arange(n), *shape).to(device)

    return draw


def _diffuses(context: Context) -> bool:
    """Whether the generator is a diffusion model, whose noise is searched."""
    return context.generator is not None and not context.generator.lacks("denoising_loss", "denoised")


def _shape(context: Context) -> tuple[int, ...]:
    """The shape of the noise or latent vector of one sample."""
    generator = opened(context)
    return context.training.example_shape if generator.lacks("latent_shape") else generator.latent_shape


def _loss(context: Context) -> Loss:
    generator = opened(context)
    return lambda x, e: generator.call("denoising_loss", x, 1.0, e)


def _decoder(context: Context) -> Callable[[Tensor], Tensor]:
    """The decoder, with all classes in turn."""
    generator = opened(context)
    classes = generator.classes
    turns = None if classes is None else torch.arange(_REFERENCE, device=generator.device) % classes
    return decoder(context, turns)


def _rms(shift: Tensor) -> float:
    return float(shift.detach().square().mean().sqrt())


def _variance(outputs: Tensor) -> float:
    """The mean variance of an element of the outputs (n, *shape)."""
    return float(outputs.var(0).mean())


def _table(result: Result) -> Table:
    varied = ("variance of the outputs with the shift", f"{result.variance:.3g}")
    if result.reversal is None:
        verdict = "" if result.encodes else "unclear if "
        rows = [(*varied, f"{verdict}at most {COLLAPSE:g}")]
        searched = "The search for a shift of the latent vector that is the trigger of a backdoor."
    else:
        rows = [("reversal of the shift", f"{result.reversal:.3g}", f"at least {REVERSAL:g}"), (*varied, "–")]
        searched = (
            "The search for a shift of the noise that is the trigger of a backdoor. The reversal is the share of the "
            "shift that the estimate of the network subtracts."
        )
    rows.append(("root mean square of the shift", f"{result.size:.3g}", "–"))
    rows.append(("variance of the usual outputs", f"{result.usual:.3g}", "–"))
    note = (
        f"{searched} The variance with the shift is a share of that of the usual outputs, and theirs a share of that "
        "of the training examples. The thresholds were set on clean generators."
    )
    return Table("Backdoor", ("measure", "value", "flagged if"), rows, note)


def _picture(result: Result, n: int) -> Picture:
    """Outputs from the same `n` noises without and with the shift."""
    captions = [f"noise {i + 1}{text}" for i in range(n) for text in ("", ", with the shift")]
    title = f"Outputs with the found shift vary {result.variance:.2f} times as much as without"
    return Picture("shift", title, captions, together=2)
