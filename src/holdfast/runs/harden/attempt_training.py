"""Trains one attempt of a hardening, i.e. one recipe, on a trainable copy of the model within its time budget."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss, TargetError, UsageError
from holdfast.core.gradients import input_gradient
from holdfast.core.model import IN_PLACE, Classifier, refuse_lazy, rewrites
from holdfast.core.names import kind_of, suggestion, with_article
from holdfast.core.threat import ThreatModel
from holdfast.core.training import STATE, Checkpoint, without_prefix
from holdfast.core.types import Inputs
from holdfast.io.models.adapting import KerasNet, LinearTexts, TextEstimator, TextFunction
from holdfast.io.models.architectures import int8_layers
from holdfast.io.models.transformers_folders import ProcessedClips, ProcessedImages
from holdfast.io.models.weights import digest_of_weights, written
from holdfast.recipes.training.fit import Training, drawing
from holdfast.recipes.training.follow_up import RAISED
from holdfast.recipes.training.recipe import Recipe, facts_of
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.engine.run import Run
from holdfast.runs.harden import checkpoints
from holdfast.runs.harden.candidates import Candidate, EndedBy, Trainer, ended_by
from holdfast.runs.harden.checkpoints import BEST, LAST, Point, last_epoch
from holdfast.runs.harden.hardened import MODEL, Made, structure_metadata
from holdfast.runs.harden.pace import Clock, Pacer, smaller
from holdfast.runs.store.files import usable, write_atomically

_NAMED = 3  # frozen parameters that a message names


def refuse_untrainable(model: Classifier) -> None:
    """Raise an error if a model cannot be trained, for example because it has no gradients.

    Raises `TargetError` if it is not a network, has no gradients or cannot be saved in a checkpoint, and `UsageError`
    if all parameters are frozen.
    """
    if isinstance(model.net, TextFunction):
        _refuse_untrainable_texts(model.net)
    elif model.access != "gradients":
        raise TargetError(
            f"the model gives only {model.access} and no gradients, so it cannot be trained: {model.hides}"
        )
    if isinstance(model.net, ProcessedImages | ProcessedClips):
        of_images = isinstance(model.net, ProcessedImages)
        inputs, more = (
            ("Image", ", and the mean and std of its processor")
            if of_images
            else ("Audio", " behind the normalisation of its feature extractor")
        )
        raise TargetError(
            "the model is a folder of transformers, whose new weights harden cannot write to a folder; give "
            "FILE.py:FACTORY, whose factory returns the network, as in "
            f"transformers.AutoModelFor{inputs}Classification.from_pretrained(FOLDER){more}"
        )
    if not isinstance(model.net, nn.Module) or not any(True for _ in model.parameters()):
        raise TargetError("the model has no parameters to train; give a network, as in net.py:make")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TargetError(
            "the model is TorchScript, whose copies cannot be trained; give the network from which it was made, as in "
            "net.py:make"
        )
    if isinstance(model.net, KerasNet):
        raise TargetError(
            f"the model is a {model.net.name} of Keras, whose layers have state that is not part of a checkpoint; "
            "train it with Keras, or give the same network built of torch.nn, as in net.py:make"
        )
    refuse_lazy(model)
    if rounded := [name for name, layer in int8_layers(model.net).items() if not layer.is_trained]:
        raise TargetError(
            f"{len(rounded)} layers of the model have weights of 8 bits ({_shown(rounded)}), which are not trained; "
            "give the network from which it was made"
        )
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TargetError(
                f"{name} of the model is {kind_of(value)}, and a checkpoint contains only tensors; keep what "
                f"get_extra_state returns in buffers, with register_buffer"
            )
    frozen = _frozen(model)
    if len(frozen) == sum(1 for _ in model.parameters()):
        raise UsageError(
            f"all {len(frozen)} parameters are frozen; set requires_grad=True in the function that builds the model"
        )


def _refuse_untrainable_texts(function: TextFunction) -> None:
    """Raise `TargetError` for a model of texts whose weights are hidden, or cannot be written to its file."""
    if type(function) is not TextFunction:
        raise TargetError(
            "the model is a folder of transformers, whose new weights harden cannot write to a folder; give "
            "FILE.py:FACTORY, whose factory returns a torch.nn.Module that contains the network and its tokenizer, and "
            "whose forward takes a list of strings and returns logits"
        )
    if not any(True for _ in function.parameters()):
        raise TargetError(
            f"the model is {with_article(type(function.model).__name__)} from texts to scores, which hides its "
            "weights, so it cannot be trained; let the factory return a torch.nn.Module whose forward takes a list of "
            "strings and returns logits, or a fitted pipeline of scikit-learn that ends with a linear classifier"
        )


def with_trainable_texts(model: Classifier) -> Classifier:
    """Return a model of texts in a form whose weights can be trained: a copy of a pipeline of scikit-learn whose linear
    classifier is a layer of torch. Other models are returned as they are.

    Raises `TargetError` for an estimator whose weights cannot be trained.
    """
    if not isinstance(model.net, TextEstimator):
        return model
    trainable = deepcopy(model)
    trainable.net = TextFunction(LinearTexts(model.net.interface.source), model.net.digest).eval()
    trainable.output = "logit"
    return trainable


def training_notes(model: Classifier, x: Inputs) -> tuple[str, ...]:
    """Return notes for the report on properties of a model that impair its training, such as frozen parameters.

    A note states that some parameters are frozen, that the loss does not depend on some, that the model changes its
    inputs in place, or that no gradient reaches the inputs.
    """
    frozen, unused = _frozen(model), _unused(model, x)
    n_parameters = sum(1 for _ in model.parameters())
    frozen_note = (
        f"{len(frozen)} of {n_parameters} parameters are frozen and are not trained: {_shown(frozen)}"
    )
    unused_note = (
        f"{len(unused)} of {n_parameters} parameters are not trained, because the logits do not depend on them: "
        f"{_shown(unused)}. Of several outputs in training mode, as of auxiliary classifiers, only the first is trained"
    )
    flat_note = (
        f"no gradient reaches any of the first {len(x)} held-out examples, so a gradient-based attack in the training "
        f"changes them at random; find the operation that stops it (detach, no_grad, rounding) with holdfast doctor"
    )
    return tuple(
        text
        for text, applies in (
            (frozen_note, frozen),
            (unused_note, unused),
            (IN_PLACE, model.rewrites),
            (flat_note, not isinstance(model.net, TextFunction) and _flat(model, x)),
        )
        if applies
    )


def freeze_others(model: Classifier, patterns: Sequence[str]) -> None:
    """Freeze the parameters of a model whose names match none of the patterns, in place; without patterns none.

    Names are those of the network, as in its state dict. Raises `UsageError` for a pattern that matches no parameter,
    and if all parameters that match are frozen already.
    """
    named = {name.removeprefix("net."): weight for name, weight in model.named_parameters()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            listed = suggestion(pattern.replace("*", ""), named) or f"the parameters are {_shown([*named])}"
            raise UsageError(f"train_only is {pattern!r}, which matches no parameter; {listed}")
    for name, weight in named.items():
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in named.values()):
        raise UsageError(
            f"train_only is {', '.join(patterns)}, and the parameters that match are frozen; set requires_grad=True in "
            "the function that builds the model"
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _unused(model: Classifier, x: Inputs) -> list[str]:
    """Names of the parameters on which the logits in training mode do not depend, without frozen ones."""
    copied = deepcopy(model).train()
    weights = {name: weight for name, weight in copied.named_parameters() if weight.requires_grad}
    try:
        with torch.enable_grad(), drawing(Draws(0).at("unused"), x.device):
            copied(x).sum().backward()
    except (TargetError, RuntimeError, MemoryError):
        return []  # the training raises it again
    return [name for name, weight in weights.items() if weight.grad is None]


def _flat(model: Classifier, x: Inputs) -> bool:
    """Whether no gradient reaches the inputs."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad(), drawing(Draws(0).at("flat"), x.device):
        top = deepcopy(model).eval()(leaf).amax(1)
        return not input_gradient(top, leaf).any()


def _frozen(model: Classifier) -> list[str]:
    return [name for name, weight in model.named_parameters() if not weight.requires_grad]


def copy_of(model: Classifier) -> Classifier:
    """Return a copy of a model. Raises `TargetError` if the model cannot be copied, or the copy shares its weights."""
    try:
        copied = deepcopy(model)
    except Exception as error:  # a layer may raise any exception
        raise TargetError(
            "the model cannot be copied, but a copy is needed because the given model is never changed: "
            f"{type(error).__name__}: {error}; define the methods that copy.deepcopy needs, such as __deepcopy__"
        ) from error
    addresses = {
        weight.data_ptr() for weight in model.parameters() if weight.numel()
    }  # others have the address 0
    if any(weight.data_ptr() in addresses for weight in copied.parameters()):
        raise TargetError(
            "a copy of the model shares its weights, but the given model must not change; let its "
            "__deepcopy__ copy them"
        )
    return copied


def learner_of(model: Classifier, x: Inputs) -> Classifier:
    """Return a copy of a model that can be trained or attacked, on the device of the inputs `x`.

    If the model changes its inputs in place, the copy clones them before each pass. Training and evaluation mode are
    both tested, because for example dropout changes inputs in training mode only.
    """
    copied = copy_of(model).to(x.device)
    with drawing(Draws(0).at("in place"), x.device):
        copied.rewrites = any(
            rewrites(deepcopy(copied).train(is_training), x) for is_training in (False, True)
        )
    return copied


def threats_of(threat: ThreatModel, recipes: Sequence[Recipe]) -> list[ThreatModel]:
    """Return the given threat model, followed by a copy of it for each other norm that the recipes train for."""
    others = [norm for recipe in recipes for norm in facts_of(recipe).further_norms]
    return [threat, *(replace(threat, constraint=norm) for norm in others)]


def spent_before(plan: Mapping[str, Any], earlier: Sequence[Made]) -> float:
    """Return the seconds of the planning of a hardening and of the attempts `earlier`."""
    return float(plan["planning_s"]) + sum(point.wall_s for made in earlier for point in made.curve)


@dataclass(frozen=True)
class AttemptTraining:
    """Trains a copy of the model with the recipe of one attempt of a hardening."""

    subject: DescribedModel
    trainer: Trainer
    candidate: Candidate
    attempt: Mapping[str, Any]
    """entry of the plan of the hardening"""
    budget_s: float | None
    """seconds for the planning, all attempts before and this one; None for the epochs of the recipe"""
    earlier_s: float
    """seconds of the planning and of all attempts before"""
    place: Path
    """folder with the checkpoints"""
    metadata: Mapping[str, str]
    """metadata for the file with the weights of the model"""
    clock: Clock

    def trained(self, run: Run) -> Made:
        """Train until the training is finished, and return the model of the best checkpoint."""
        curve = self._curve(run)
        best, last = checkpoints.saved(self.place, BEST), checkpoints.saved(self.place, LAST)
        assert best is not None and last is not None
        state = last.checkpoint.tensors.get(STATE + RAISED)
        # if the budget left no update, no checkpoint records the end
        return Made(
            self.candidate,
            self.attempt,
            self._new_model(best.checkpoint),
            curve,
            best.curve[-1],
            0 if state is None else int(state),
            self._ended_by(last.checkpoint, curve, self.candidate.recipe.training) or "budget",
            len(last.checkpoint.plans),
            without_prefix(best.checkpoint.tensors, STATE),
        )

    @property
    def resumed(self) -> str:
        """Message that states where the training continues; empty if there is no checkpoint."""
        settings, last = self._settings, checkpoints.saved(self.place, LAST)
        curve = () if last is None else last.curve
        training = f"training by {self.candidate.name}"
        if last is not None and self._ended_by(last.checkpoint, curve, settings):
            return f"{training} is complete"
        batch = checkpoints.saved_batch(self.place) or settings.batch
        latest = checkpoints.saved_within(self.place, last_epoch(curve), batch) or last
        if latest is None:
            return ""
        n_epochs, n_updates = latest.checkpoint.epoch, latest.checkpoint.step
        done = [f"epoch {n_epochs}"] if n_epochs else []
        if n_updates:
            done.append(f"{n_updates:,} {'update' if n_updates == 1 else 'updates'} of epoch {n_epochs + 1}")
        left = ""
        if self.budget_s is not None:
            left_s = max(self.budget_s - self._spent_s(), 0)
            left = f"; {left_s:.3g} s of the budget are left"
        return f"{training} continues after {' and '.join(done)}{left}"

    def _curve(self, run: Run) -> tuple[Point, ...]:
        """Train, and return the curve over all epochs. The last and the best checkpoint are in their files."""
        settings, attempt = self._settings, self.attempt
        if self.budget_s is not None:  # after the planning, earlier attempts and the epochs that are done
            times = (self.budget_s, attempt["epoch_s"], attempt["evaluation_s"], self._spent_s())
            settings = replace(settings, pacing=Pacer(*times, self.clock))
        batch = checkpoints.saved_batch(self.place) or settings.batch
        while True:
            try:
                sized = replace(settings, batch=batch, lr=settings.lr * batch / settings.batch)
                return self.trainer.course(self.place, self.candidate, sized, run)
            except (RuntimeError, MemoryError) as error:
                batch = smaller(batch, error)
                with run.stopper.finishing():
                    checkpoints.save_batch(self.place, batch)
            except LostLoss as error:
                raise error.ended(self._save_best()) from error

    def _ended_by(self, last: Checkpoint, curve: tuple[Point, ...], settings: Training) -> EndedBy | None:
        return ended_by(last, curve, settings, self.trainer.start(self.candidate.recipe))

    @property
    def _settings(self) -> Training:
        """The settings of the training."""
        settings = self.candidate.recipe.training
        if self.budget_s is None:
            return settings
        # a recipe with its own loop uses the epochs of the first plan
        epochs, lr = max(int(self.attempt["epochs"]), 1), self.attempt.get("lr")
        return replace(settings, epochs=epochs, lr=lr or settings.lr)

    def _spent_s(self) -> float:
        """Seconds of the planning, of earlier attempts, and of the stored part of this one."""
        last = checkpoints.saved(self.place, LAST)
        curve = () if last is None else last.curve
        in_epoch_s = checkpoints.seconds_within(self.place, last_epoch(curve))
        return self.earlier_s + sum(point.wall_s for point in curve) + in_epoch_s

    def _save_best(self) -> str:
        """Save the best model so far, if there is one, and return a sentence with its path."""
        best, last = checkpoints.saved(self.place, BEST), checkpoints.saved(self.place, LAST)
        if best is None or last is None:
            return "no epoch had been finished"
        net = self._new_model(best.checkpoint).model.net
        assert isinstance(net, nn.Module)
        path = self.place / MODEL
        with usable(path):
            write_atomically(path, written(net, {**self.metadata, **structure_metadata(net)}))
        return f"the best of the {last_epoch(last.curve)} epochs before is in {str(path)!r}"

    def _new_model(self, checkpoint: Checkpoint) -> DescribedModel:
        facts = facts_of(self.candidate.recipe)
        new = facts.network(self.subject.model)
        checkpoint.put_into(new)
        name = f"{self.subject.card.get('name', 'model')}, {self.candidate.name}"
        card = {**self.subject.card, "name": name}
        if facts.new_network:
            card["parameters"] = sum(weight.numel() for weight in new.parameters())
            card |= {"access": new.access, "output": new.output}
        assert isinstance(new.net, nn.Module)
        digest = digest_of_weights(new.net.state_dict())  # of the tensors in the file of the new model
        return replace(self.subject, model=new.eval(), digest=digest, card=card)
