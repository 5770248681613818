"""Opens what the hardening of a generator needs, trains it, and writes the new generator."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.audits.audit import AuditResult, audited
from holdfast.audits.finding import Images, StoredSteps
from holdfast.audits.generator.audit import finding_of_steps, needs_of
from holdfast.audits.generator.hardening import BEFORE, GeneratorHardening, measure, trainable
from holdfast.core.catalogue import GENERATOR_RECIPES
from holdfast.core.draws import Draws
from holdfast.core.errors import NoSplit, UsageError, refuse_unmet
from holdfast.generators.adapters import GAN
from holdfast.generators.networks import FILE, ImageGAN, bundled_generators, content_of, names_generator
from holdfast.io.models.factories import names_code
from holdfast.io.models.weights import written
from holdfast.recipes.training.gans import RobustLosses
from holdfast.reports.audit import audit_report, headline
from holdfast.reports.write import rendered
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.hardened import CardForm, Hardened
from holdfast.settings.grammar import seconds
from holdfast.verbs.audit.generator import AuditGenerator
from holdfast.verbs.audit.opening_generators import opened_audit
from holdfast.verbs.opening import resolve
from holdfast.verbs.opening.arguments import gradients
from holdfast.verbs.opening.recipes import built
from holdfast.verbs.settings import Harden

KIND = "hardened-generator"
"""Kind of the run, in `holdfast.core.catalogue.AUDITS`."""


HardenedGenerator = Hardened[GAN, AuditResult]
"""A new generator with the audits before and after. `holdfast audit generator` opens its file if it is an
`holdfast.generators.ImageGAN`."""


def _files(hardened: HardenedGenerator, place: Path) -> dict[str, bytes]:
    report = audit_report(hardened.card)
    cards = {f"card{suffix}": rendered(report, suffix).encode() for suffix in (".json", ".md")}
    return {FILE: hardened.weights, **cards}


@gradients()
def hardened_generator(
    settings: Harden,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    command: str = "",
) -> HardenedGenerator:
    """Train the generator of the settings with one of `GENERATOR_RECIPES`, and audit it before and after. Raises
    `UsageError` if it is no GAN of torch modules with a discriminator.
    """
    place = resolve.free_folder_of(folder, resume=resume)
    if not isinstance(settings.data, str):
        raise UsageError(
            "a generator is trained on the train split of the data, and compared with the test split; give a file or "
            "a name with both"
        )
    name, losses = _losses(settings.recipe)
    model = settings.model
    if isinstance(model, str) and not (names_code(model) or names_generator(model)):
        raise UsageError(
            f"the model is {model!r}, and {name} trains a generator; give a function that returns one, as in "
            f"gen.py:make, its file .safetensors, or one of {', '.join(bundled_generators())}"
        )
    try:
        request, how = opened_audit(_audit_settings(settings), notify)
    except NoSplit as error:
        raise NoSplit(f"a generator is trained on the split train of the data: {error.message}") from error
    refuse_unmet(needs_of(how, settings.gates))
    assert how.generator is not None  # the model is no file of samples
    budget = None if settings.budget is None else seconds(settings.budget, "budget")
    gan, rng = trainable(how.generator, how.training), Draws(settings.seed).at("hardening")
    work = GeneratorHardening(how, gan, losses, losses.teacher > 0, budget, settings.seed, rng)
    recipe = {"use": name, **vars(losses)}
    request = replace(
        request,
        kind=KIND,
        settings={**request.settings, "recipe": recipe, "budget_s": budget},
        steps=work.steps,
        gates=tuple(settings.gates),
        command=command,
        examples=settings.examples,
        writes=True,  # the trained generator is read from the stored steps
    )
    trained: list[GAN] = []
    given: list[dict[str, Any]] = []

    def audit(run: Run) -> Images:
        images, new = measure(run, work)
        trained.append(new)
        steps = StoredSteps(request.manifest(), run.store, Path())
        given.append(finding_of_steps(steps.within(BEFORE)).to_json())
        return images

    after = audited(request, audit, place, resume=resume, progress=progress, notify=notify)
    before = AuditResult({**after.content, **given[-1], "pictures": [], "gates": [], "gate_verdict": None})
    new = trained[-1]
    weights = content_of(new, "gan", new.arguments) if isinstance(new, ImageGAN) else written(new, {})
    card, form = after.summary(), CardForm(_files, headline, audit_report)
    return Hardened(new, before, after, (), card, weights, after.folder, form=form)


def _losses(spec: Mapping[str, Any]) -> tuple[str, RobustLosses]:
    name = str(spec["use"])
    given = {**GENERATOR_RECIPES[name], **{key: value for key, value in spec.items() if key != "use"}}
    return name, built(RobustLosses, given, f"recipe {name}", "recipe")


def _audit_settings(settings: Harden) -> AuditGenerator:
    """The settings of the audits: those that both commands have. Raises `UsageError` if another one was given."""
    own = AuditGenerator.model_fields.keys() - {"split", "n", "sample"} | {"recipe", "budget"}
    if of_classifiers := settings.model_fields_set - own:
        name = min(of_classifiers)
        given = settings.model_dump(include={name})[name]
        raise UsageError(
            f"{name} is {given!r}, and the recipe {settings.recipe['use']} trains a generator, for "
            f"which there is no such setting; leave {name} out"
        )
    shared = {
        name: getattr(settings, name)
        for name in settings.model_fields_set
        if name in AuditGenerator.model_fields and name not in ("gates", "output")
    }
    return AuditGenerator(**shared, split="train", held_out=settings.data)
