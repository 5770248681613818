"""The configuration file: what cannot be meant is said in one sentence, whatever is wrong with it."""

import json
from dataclasses import is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import iter_modules
from types import SimpleNamespace

import pytest
import torch

import holdfast
from holdfast import attacks, recipes
from holdfast.attacks.parts.ascent import cosine
from holdfast.attacks.parts.losses import dlr
from holdfast.attacks.pgd import margin_pgd
from holdfast.attacks.suites import LABELS_ONLY, SUITES, VARIANTS, curve, suite, variant
from holdfast.core.catalogue import ATTACKS, AUDITS
from holdfast.core.chain import canonical
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.errors import UsageError
from holdfast.core.names import parse_number
from holdfast.doubts.answering import arms
from holdfast.recipes.training.recipe import RecipeFacts
from holdfast.settings.grammar import (
    ADAPTIVE,
    SPELLINGS,
    SUITE_SPELLINGS,
    attack_called,
    every_name,
    folded,
    names_in_suite,
    norms_of_suite,
    parse_pairs,
    parse_surrogate,
    seconds,
    suite_or_attacks,
    usual_suite,
)
from holdfast.settings.groups import ThreatSource
from holdfast.threats.parsing import parse_threat
from holdfast.threats.transformations import Colour, Corruptions, Patch, Spatial
from holdfast.verbs import configuration as settings
from holdfast.verbs import rotate as rotating
from holdfast.verbs.checked_settings import composed as compose_settings
from holdfast.verbs.checked_settings import group_of
from holdfast.verbs.configuration import validate
from holdfast.verbs.opening.recipes import build_attack
from holdfast.verbs.settings import Assess, Certify, Doctor, Harden, RotateSettings, Serve

REFUSED = [
    ("? [a]\n: b", "is not a valid key"),
    ("seed: 2020-13-45", "is not valid YAML"),
    ("a: [", "is not valid YAML"),
    ("full: !!bool maybe", "is not valid YAML: 'maybe'"),
    ("seed: !!int ''", "is not valid YAML"),
    ("seed: !!timestamp now", "is not valid YAML"),
    (f"seed: {':'.join(['1'] * 300)}.5", "is not valid YAML: int too large to convert to float"),
    ("model: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ("- model", "contains a list"),
    ("n: 1\nn: 2", "holdfast.yaml: 'n' is given twice"),
    (
        "drop: &a [x]\nonly: *a",
        r"\*a is an alias \(line 2\), and aliases are not read; write the value itself",
    ),
    ("thret: linf:0.1", "did you mean 'threat'"),
    ("n: 0", "holdfast.yaml: n is 0; expected at least 1$"),
    ("n: abc", "n is 'abc'; expected a whole number$"),
    ("only: [apgd-q]", "this suite has no attack 'apgd-q'; did you mean 'apgd-t'"),
    ("only: [alma-2]", "this suite has no attack 'alma-2'; expected one of sprint, fmn, relay"),
    ("attacks: [{use: PGD}]\nskip: [fmn]", "this suite has no attack 'fmn'; expected one of pgd"),
    ("suite: rand\nskip: [apgd-ce, APGD-DLR]", "no attack is left; this suite has apgd-ce, apgd-dlr"),
    ("n: 1.5", "n is 1.5; expected a whole number$"),
    ("n: 2.0", "n is 2.0; expected a whole number$"),
    ("n: true", "n is True; expected a whole number$"),
    ("n: '5'", "n is '5'; expected a whole number$"),
    ("seed: false", "seed is False; expected a whole number$"),
    ("", "contains no keys; expected keys such as model: and data:"),
    ("# n: 1", "contains no keys"),
    (
        "suite: [{use: PGD}]",
        r"suite is \[{'use': 'PGD'}\]; .* under attacks:, as in \[{use: PGD, steps: 100}\]",
    ),
    ("attacks: [{use: PGD, steps: true}]", "steps is True; expected a whole number$"),
    ("full: perhaps", "full is 'perhaps'; expected true or false$"),
    ("mean: [a]", "expected a number"),
    ("std: [[1]]", r"std.0 is \[1\]; expected a number$"),
    ("only: PGD", "only is 'PGD'; expected a list$"),
    ("model: 3", "model is 3; expected an address"),
    ("model_args: [a]", "expected names with values"),
    ("bounds: [1]", r"bounds are \[1\]; give two numbers, the lower first"),
    ("schema_version: 3", "schema_version is 3; expected 2$"),
    ("n: 3\nsample: 3", "not both"),
    ("bounds: [1, 0]", "the lower first"),
    ("bounds: [0, .inf]", "the lower first"),
    ("mean: 0.5,x", "expected a number"),
    ("surrogates: [{arch: cnn}]", "surrogates.0.model"),
    ("surrogates: [{model: a, archs: cnn}]", "archs"),
    ("surrogates: [',arch=cnn']", "has no address"),
    ("surrogates: ['a.pt,mean=0.5,mean=0.5']", "mean twice"),
    ("surrogates: ['a.pt,mean=x']", "expected a number"),
    ("surrogates: ['a.pt,decay=0.2']", "decay=0.2 but no residual branches"),
    ("surrogates: ['a.pt,skip=b,decay=2']", "surrogates.0.decay"),
    ("surrogates: ['a.pt,skip=b,decay=half']", "decay is 'half'; expected a number or a fraction"),
    ("suite: quik", "suite is 'quik'; did you mean 'quick'"),
    ("suite: quick\nattacks: [{use: PGD}]", "not both"),
    ("attacks: []", r"attacks is \[\]; expected at least 1 entry$"),
    ("attacks: [{steps: 3}]", "needs a name"),
    ("attacks: [{use: PGDD}]", "did you mean 'PGD'"),
    ("attacks: [{use: PGD, stepz: 3}]", "did you mean 'steps'"),
    ("attacks: [{use: PGD, steps: 0}]", "attacks.0: steps is 0; expected at least 1$"),
    ("attacks: [{use: PGD, steps: [1]}]", r"steps is \[1\]; expected a whole number$"),
    (
        "attacks: [{use: PGD, loss: cosine}]",
        "loss is 'cosine'; did you mean|loss is 'cosine'; expected one of",
    ),
    ("attacks: [{use: PGD, loss: [dlr]}]", "expected one of cross_entropy|did you mean 'dlr'"),
    ("attacks: [{use: PGD, steps: {use: PGD}}]", "steps is"),
    ("gates: [robust_acuracy >= 0.5]", "did you mean 'robust_accuracy'"),
    ("accept_doubts: {noize: I know}", "did you mean 'noise'"),
    ("accept_doubts: {noise: }", "without a reason; give accept_doubts="),
    ("accept_doubts: {noise: ' '}", "without a reason; give accept_doubts="),
    ("output: [report.pdf]", "has the suffix '.pdf'"),
    ("time_budget: 5 weeks", "expected a duration"),
    ("adaptive: true\nadaptive_budget: 0", "adaptive_budget is 0; expected at least 1$"),
    ("adaptive: true\nadaptive_budget: -5", "adaptive_budget is -5; expected at least 1$"),
    ("adaptive_budget: 100", "but no adaptive attacks are run"),
    ("std: [0.5, 0]", r"std is \[0.5, 0.0\]; every number must be positive"),
    ("serve: {scores: 16}", "scores is '16'; expected all, labels, or a number of decimal digits up to 15"),
    ("serve: {drain: 5 weeks}", "drain is '5 weeks'; expected a duration"),
    ("serve: {drain_delay: 5}", "drain_delay is 5; expected a duration such as 5s, or 0s"),
    ("serve: {log_format: xml}", "log_format is 'xml'"),
    ("adapt: {trigger: soon}", "trigger is .soon.; expected a duration .*, or one of alarm, now"),
    ("threat: linf:-1", "eps is -1"),
    ("threat: l0:1.5", "must be whole"),
    ("threat: l0:infpx", "must be whole"),
    ("threat: 'linf:0.1,queries=\u00b2'", "queries is '\u00b2'; expected a whole number of at least 1"),
    ("threat: 'linf:0.1,goal=targeted:\u0663'", "expected untargeted or targeted:K"),
    ("threat: 'linf:0.1,goal=targeted: '", "expected untargeted or targeted:K"),
    (f"threat: 'linf:0.1,queries={'9' * 5000}'", "expected a whole number of at least 1"),
]


def read(*args, kind=Assess, **more):
    """The values of settings from a file and flags, by key."""
    return values(settings.read_settings(*args, kind=kind, **more))


def check(content, where):
    return values(settings.check_settings(content, where, kind=Assess))


def values(of):
    return SimpleNamespace(**{key: value for key, value, _ in settings.items(of)})


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_impossible_settings_are_usage_errors(text, said, tmp_path):
    path = tmp_path / "holdfast.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        validate(path)


def test_a_slip_in_set_is_a_usage_error():
    with pytest.raises(UsageError, match="--set n is not valid YAML"):
        read(None, {}, ["n=["])
    with pytest.raises(UsageError, match=r"'\u00b2' is not an entry of a list"):
        read(None, {}, ["gates=[robust_accuracy >= 0.5]", "gates.\u00b2=1"])
    with pytest.raises(UsageError, match=r"there is no entry '5'"):
        read(None, {}, ["gates=[robust_accuracy >= 0.5]", "gates.5.x=1"])


def test_what_excludes_each_other_is_refused_among_flags_and_replaced_in_the_file(tmp_path):
    path = tmp_path / "holdfast.yaml"
    path.write_text("sample: 5\nattacks: [{use: PGD}]\n")
    found = read(path, {"suite": "quick"}, ["n=3"])
    assert (found.n, found.sample, found.suite, found.attacks) == (3, None, "quick", None)
    with pytest.raises(UsageError, match="not both"):
        read(path, {"n": 3}, ["sample=5"])
    with pytest.raises(UsageError, match="not both|attacks"):
        read(path, {"suite": "quick"}, ["attacks.0.steps=4"])
    path.write_text("sample: many\n")
    with pytest.raises(UsageError, match="holdfast.yaml: sample is 'many'"):
        read(path, {"n": 3})


def test_a_slip_is_named_as_it_was_given(tmp_path):
    path = tmp_path / "holdfast.yaml"
    path.write_text("seed: -1\n")
    with pytest.raises(UsageError, match=r"^-n is 0; expected at least 1$"):
        read(None, {"n": 0}, flags={"n": "-n"})
    with pytest.raises(UsageError, match=r"^--set n is 'abc'; expected a whole number$"):
        read(None, {}, ["n=abc"])
    with pytest.raises(UsageError, match=r"holdfast.yaml: seed is -1; expected at least 0$"):
        read(path, {"n": 3}, flags={"n": "-n"})
    with pytest.raises(UsageError, match=r"^n is 0; expected at least 1$"):
        read(None, {"n": 0})


def test_flags_beat_set_and_set_beats_the_file(tmp_path):
    path = Path(tmp_path / "holdfast.yaml")
    path.write_text("n: 1\nseed: 1\nsuite: quick\nattacks: null\n")
    settings = read(path, {"n": 3, "seed": None}, ["n=2", "seed=2", "threat=l2:1/2"])
    assert (settings.n, settings.seed, settings.suite, str(settings.threat)) == (3, 2, "quick", "l2:1/2")


def test_numbers_may_be_fractions_at_every_depth():
    settings = check({"mean": "1/2,0.25", "std": ["1/4", 1]}, "here")
    assert settings.mean == (0.5, 0.25)
    assert settings.std == (0.25, 1.0)
    assert build_attack({"use": "PGD", "reach": "5/2", "steps": "1e1"}, "here").reach == 2.5
    assert build_attack({"use": "PGD", "steps": "1e1"}, "here").steps == 10


def test_attacks_may_be_named_with_commas():
    settings = read(None, {"suite": "standard", "skip": ["apgd-ce, apgd-t", "fab-t"]})
    assert settings.skip == ["apgd-ce", "apgd-t", "fab-t"]
    with pytest.raises(UsageError, match="no attack is left"):
        read(None, {"suite": "rand", "skip": ["apgd-ce,apgd-dlr"]})


def test_functions_are_named():
    attack = build_attack({"use": "PGD", "loss": "dlr", "schedule": "cosine"}, "here")
    assert (attack.loss, attack.schedule) == (dlr, cosine)


def test_the_catalogue_lists_every_attack_and_recipe():
    for package in (attacks, recipes):
        modules = [
            import_module(f"{package.__name__}.{each.name}") for each in iter_modules(package.__path__)
        ]
        defined = {
            name
            for module in modules
            for name, value in vars(module).items()
            if is_dataclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
            if package is attacks or issubclass(value, RecipeFacts)
        }
        # the adaptive search is an attack that only raised doubts require
        assert defined - {"Passes", "AttackSpec", "Suite", "AdaptiveSearch"} == set(package.__all__)
    assert {name: entry.needs for name, entry in ATTACKS.items()} == {
        name: getattr(attacks, name).needs for name in ATTACKS
    }


def test_every_attack_of_every_suite_is_built_from_the_catalogue():
    for by_kind in SUITES.values():
        for specs in by_kind.values():
            for spec in specs:
                assert spec.attack in ATTACKS and type(spec.build()).__name__ == spec.attack
                assert spec.name == spec.attack or VARIANTS[spec.name] == spec.attack
    assert suite("quick", L0(1)).attacks == (("PGD", margin_pgd(steps=50, restarts=2)),)
    for specs in LABELS_ONLY.values():
        assert all(type(spec.build()).__name__ == spec.attack for spec in specs)
    for constraint in (Linf(), L2(), L1(), L0()):
        assert curve(constraint)[1].needs == "gradients"


def test_every_printed_name_and_every_short_form_names_one_thing():
    for name in (*ATTACKS, *VARIANTS):
        assert attack_called(name) == attack_called(name.swapcase().replace("-", "_")) == name
    assert set(SPELLINGS) <= {*ATTACKS, *VARIANTS}
    for name, each in SPELLINGS.items():
        assert {attack_called(form) for form in (each.paper, *each.short) if form} <= {name}
    forms = [folded(form) for each in SPELLINGS.values() for form in each.short]
    forms += [folded(form) for of in SUITE_SPELLINGS.values() for form in of]
    plain = [*map(folded, (*ATTACKS, *VARIANTS)), *map(folded, SUITES)]
    assert len(set(forms)) == len(forms) and not set(forms) & set(plain)
    assert suite_or_attacks(["Auto_Attack"]) == suite_or_attacks(["AA"]) == "standard"
    assert set(SUITES) <= set(every_name()) and {"PGD", "Relay-2", "cw", "aa"} <= set(every_name())
    printed = {arm.name for constraint in (Linf(0.1), L2(1.0), L0(1)) for arm in arms(constraint)}
    assert printed == set(ADAPTIVE)


def test_a_name_from_a_suite_has_the_settings_of_the_suite():
    constraints = {
        "linf": Linf(0.1),
        "l2": L2(1.0),
        "l1": L1(1.0),
        "l0": L0(1),
        "corruptions": Corruptions(3),
    }
    for name, of in VARIANTS.items():
        for norm, constraint in constraints.items():
            found = variant(name, constraint)
            assert (type(found).__name__ if found else None) == (of if norm in norms_of_suite(name) else None)
    assert variant("APGD-T", Linf(0.1)) == dict(suite("standard", Linf(0.1)).attacks)["APGD-T"]


def test_all_attacks_of_fast_but_the_first_go_in_waves():
    for norm in ("linf", "l2", "l1", "l0"):
        first, *others = SUITES["fast"][norm]
        assert first.waves == 0 and all(spec.waves for spec in others)


def test_the_members_of_a_suite_are_known_by_their_names():
    constraints = {
        "linf": Linf(0.1),
        "l2": L2(1.0),
        "l1": L1(1.0),
        "l0": L0(1),
        "corruptions": Corruptions(3),
        "patch": Patch(5, 5),
        "spatial": Spatial(rotate=30),
        "colour": Colour(hue=18),
    }
    bent = Spatial(flow=1.5)
    for name in ("quick", "fast", "standard"):
        assert {spec.name for spec in suite(name, bent).specs} == {"Flow"}
    with pytest.raises(UsageError, match="expected one of fast, quick, standard"):
        suite("black-box", bent)
    for name, by_kind in SUITES.items():
        for norm, constraint in constraints.items():
            if norm in by_kind:
                assert [type(attack).__name__ for _, attack in suite(name, constraint).attacks] == [
                    spec.attack for spec in by_kind[norm]
                ]
            else:
                with pytest.raises(
                    UsageError, match="corruptions" if "corruptions" in (name, norm) else norm
                ):
                    suite(name, constraint)


def test_a_suite_shows_the_attacks_of_labels_alone_only_to_threats_that_see_no_more():
    seeing = {access: parse_threat(f"l2:1,access={access}") for access in ("labels", "scores")}
    assert names_in_suite("black-box", seeing["labels"]) == ("HopSkipJump", "SurFree")
    assert names_in_suite("black-box", seeing["scores"]) == ("Square",)
    assert names_in_suite("quick", seeing["labels"]) == ("Sprint",)
    assert names_in_suite("black-box", parse_threat("l1:1,access=labels")) == ()


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("PGD", "PGD"),
        ("pgd", "PGD"),
        ("apgd_t", "APGD-T"),
        ("apgdce", "APGD-CE"),
        ("deepfool", "DeepFool"),
        ("hop-skip-jump", "HopSkipJump"),
        ("CW", "CarliniWagner"),
        ("sprint", "Sprint"),
        ("relay 2", "Relay-2"),
        ("i-fgsm", "BIM"),
        ("transfer", "Transfer"),
    ],
)
def test_an_attack_is_found_by_its_usual_spellings(name, attack):
    assert attack_called(name) == attack


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pgdd", "did you mean 'PGD'"),
        ("zzz", "expected one of ALMA"),
        ("deepfol", "'DeepFool'"),
        ("bpda", "adaptive"),
        ("apgd-t", "APGD-T is the name of APGD"),
    ],
)
def test_use_takes_the_name_of_an_attack_with_settings(name, said):
    with pytest.raises(UsageError, match=said):
        build_attack({"use": name}, "here")


def test_the_grammar_reads_what_it_writes():
    for text in ("linf:0.25", "l2", "l0:10px", "l1:12,goal=targeted:3,access=scores,queries=50"):
        assert parse_threat(text).opened().text == text
    assert parse_threat("linf:8/255").eps == 8 / 255
    assert parse_threat("l0:inf") == parse_threat("l0")
    assert (seconds("2min", "it"), parse_number("8/255", "it"), parse_pairs(["a=b=c"], "--x")) == (
        120,
        8 / 255,
        {"a": "b=c"},
    )


def test_a_surrogate_is_an_address_with_settings():
    assert parse_surrogate("mnist-cnn") == {"model": "mnist-cnn"}
    written = "a,b/net.pt,arch=net.py:build,mean=0.5,0.4,0.3,width=8,name=x,skip=layer*.bn2,decay=1/5"
    plain = {
        "model": "a,b/net.pt",
        "arch": "net.py:build",
        "mean": (0.5, 0.4, 0.3),
        "std": None,
        "skip": "layer*.bn2",
        "decay": 0.2,
        "model_args": {"width": "8", "name": "x"},
    }
    read_as = check({"surrogates": [written]}, "").surrogates
    assert [each.model_dump() for each in read_as] == [plain]
    assert check({"surrogates": [plain]}, "").surrogates == read_as


@pytest.mark.parametrize(
    "threat, name",
    [("linf:0.1", "fast"), ("linf:0.1,access=none", "transfer"), ("corruptions:3,access=none", "fast")],
)
def test_a_model_without_queries_is_attacked_by_transfer(threat, name):
    assert usual_suite(parse_threat(threat)) == name


def test_settings_of_a_recipe_that_is_not_named_are_of_the_usual_one():
    said = ["recipe.training.epochs=3"]
    found = {kind: read(None, {}, said, kind=kind).recipe for kind in (Harden, RotateSettings)}
    training = {"training": {"epochs": 3}}
    assert found == {Harden: {"use": "auto", **training}, RotateSettings: {"use": "card", **training}}


FILE = """
model: mnist-cnn
data: mnist-mini
seed: 1
assess: {across: [mnist-mini], seed: 2}
harden: {recipe: {use: trades, beta: 3}, budget: 5min}
rotate: {min_waiting: 3, initialisation: own}
"""


def test_one_file_serves_several_verbs(tmp_path):
    file = tmp_path / "holdfast.yaml"
    file.write_text(FILE)
    assert validate(file) == (
        "assess",
        "certify",
        "harden",
        "rotate",
        "monitor",
        *(f"audit-{name}" for name, entry in AUDITS.items() if entry.settings),
    )
    file.write_text(FILE + "threat: l0:3\n")
    assert validate(file) == ("assess", "harden", "rotate", "audit-extraction")
    file.write_text(FILE + "threat: l0:3\ncertify: {timeout: 5s}\n")
    with pytest.raises(
        UsageError, match="proved under linf, l2, l1, patch, table, text, training-set and observations only"
    ):
        validate(file)
    file.write_text("model: a.pt\ncertify: true\n")
    with pytest.raises(UsageError, match=r"certify is True; .*write assess: {certify: true}"):
        read(file, {})
    file.write_text(FILE)
    hardening = read(file, {}, kind=Harden)
    assert (hardening.recipe, hardening.budget, hardening.seed) == (
        {"use": "trades", "beta": 3},
        "5min",
        1,
    )
    assert (read(file, {}).across, read(file, {}).seed, read(file, {"seed": 3}).seed) == (
        ["mnist-mini"],
        2,
        3,
    )
    assert read(file, {}, kind=Doctor).seed == 2
    file.write_text("model: mnist-cnn\nharden: {budget: soon}\n")
    with pytest.raises(UsageError, match="budget is 'soon'; expected a duration"):
        read(file, {})
    file.write_text("harden: fast\n")
    with pytest.raises(UsageError, match="harden is 'fast'; expected settings of harden"):
        read(file, {})


def test_a_key_that_a_verb_does_not_use_is_refused_with_its_place(tmp_path):
    file = tmp_path / "holdfast.yaml"
    file.write_text("model: mnist-cnn\nrecipe: trades\nunlabelled: mnist\nn: 5\n")
    with pytest.raises(
        UsageError,
        match="recipe, unlabelled at the top, .*: recipe in harden: or rotate: or adapt:; "
        "unlabelled in harden: or adapt:$",
    ):
        read(file, {})
    assert validate(file) == ("harden",)
    file.write_text("recipe: trades\nacross: [mnist]\nmax_queries: 3\n")
    with pytest.raises(UsageError, match="recipe at the top, which assess does not use"):
        validate(file)
    with pytest.raises(UsageError, match="unknown key 'budget', which is a setting of harden, rotate"):
        read(None, {}, ["budget=5min"])
    with pytest.raises(UsageError, match="unknown key 'n', which is a setting of assess, certify, harden"):
        read(None, {}, ["n=3"], kind=RotateSettings)


def test_a_section_and_a_flag_replace_what_excludes_them_or_belongs_to_another_recipe(tmp_path):
    file = tmp_path / "holdfast.yaml"
    file.write_text(
        "n: 5\nassess: {sample: 10}\nharden: {recipe: {use: trades, beta: 6, training: {epochs: 3}}}\n"
    )
    found = read(file, {})
    assert (found.n, found.sample) == (None, 10)
    found = read(file, {}, ["recipe.use=pgd"], kind=Harden)
    assert found.recipe == {"use": "pgd", "training": {"epochs": 3}}
    file.write_text("harden: {recipe: trades}\n")
    assert read(file, {}, ["recipe.beta=6"], kind=Harden).recipe == {"use": "trades", "beta": 6}
    with pytest.raises(UsageError, match="the name of the verb is left out, as in --set n=3"):
        read(file, {}, ["assess.n=3"])


def test_validate_refuses_a_section_that_could_not_be_used(tmp_path):
    file = tmp_path / "holdfast.yaml"
    for text, message in (
        ("harden: {recipe: card}", "recipe card is not for harden"),
        ("rotate: {recipe: auto}", "recipe auto is not for rotate"),
        ("suite: quick\nrotate: {seed: 1}", "suite at the top, which rotate does not use"),
    ):
        file.write_text(f"{text}\n")
        with pytest.raises(UsageError, match=message):
            validate(file)


@pytest.mark.parametrize("step", [name for name in rotating.__all__ if name != "status"])
def test_the_steps_of_rotate_have_the_defaults_of_the_settings(step):
    usual = {key: value for key, value, _ in settings.items(RotateSettings())}
    for name, parameter in signature(getattr(rotating, step)).parameters.items():
        if name in usual and name not in ("model", "data", "immunise"):
            default = parameter.default
            assert (
                default in (usual[name], None, str(usual[name]))
                or {"use": default} == usual[name]
                or [*default] == usual[name]
            )


HOMES = {
    "assess": (Assess, holdfast.assess),
    "certify": (Certify, holdfast.certify),
    "harden": (Harden, holdfast.harden),
    "doctor": (Doctor, holdfast.doctor),
}


@pytest.mark.parametrize("verb", HOMES)
def test_every_option_has_one_place_in_python_with_the_same_default(verb):
    kind, function = HOMES[verb]
    places = {
        place.__name__: signature(place).parameters
        for place in (function, holdfast.open_model, holdfast.open_data)
    }
    table = {}
    for key, entry in kind.model_fields.items():
        homes = [name for name, parameters in places.items() if key in parameters]
        if key in ("schema_version", "output", "attacks"):  # of a file, Result.write, and suite=[PGD(…)]
            assert not homes
            continue
        if key in ("model", "data"):
            continue
        if key in (
            "ship",
            "gpus_per_worker",
            "mixed_nodes",
            "trust_network",
            "cluster_timeout" if verb == "certify" else "timeout",
        ):  # on=holdfast.Ray(…)
            assert not homes
            usual = entry.get_default(call_default_factory=True)
            assert getattr(holdfast.Ray(), key.removeprefix("cluster_")) in (usual, ()), key
            continue
        (table[key],) = homes
        default = places[table[key]][key].default
        usual = kind().model_dump()[key]
        assert default in (usual, None) or [*default] == [*usual] or usual == {"use": default}, key
    print(*(f"{key:18} holdfast.{place}" for key, place in table.items()), sep="\n")
    assert set(table.values()) == set(places)


def test_an_argument_that_moved_is_refused_with_its_place():
    with pytest.raises(
        UsageError, match=r"arch is an argument of holdfast.open_model: .*open_model\(model, arch="
    ):
        holdfast.assess("net.pt", "mnist-mini", arch="mnist-cnn")
    with pytest.raises(UsageError, match=r"give holdfast.open_data\(x, label=...\) as x"):
        holdfast.attack("mnist-cnn", "t.csv", label="kind")
    with pytest.raises(UsageError, match="assess has no argument 'archs'"):
        holdfast.assess("net.pt", "mnist-mini", archs="mnist-cnn")
    with pytest.raises(UsageError, match=r"open_model\(\): classes is 1; expected at least 2"):
        holdfast.open_model("net.pt", classes=1)
    with pytest.raises(
        UsageError, match="arch='net.py:make' is not possible for a model given as a Python object"
    ):
        holdfast.open_model(torch.nn.Linear(2, 2), arch="net.py:make")
    with pytest.raises(UsageError, match="a result of open_data already"):
        holdfast.open_data(holdfast.open_data("mnist-mini"), split="train")


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize(("key", "function"), [("trust_code", "open_model"), ("follow_links", "open_data")])
def test_consent_to_code_and_to_links_is_no_key_of_a_file_and_of_set(value, key, function, tmp_path):
    path, option = tmp_path / "holdfast.yaml", f"--{key.replace('_', '-')}"
    path.write_text(f"{key}: {value}\nmodel: mnist-cnn\ndata: mnist-mini\n")
    for ask in (lambda: validate(path), lambda: settings.read_settings(path, {}, kind=RotateSettings)):
        with pytest.raises(UsageError, match=rf"holdfast\.yaml contains {key}.*{option}.*{function}"):
            ask()
    with pytest.raises(UsageError, match=rf"--set contains {key}.*{option}"):
        settings.read_settings(None, {}, [f"{key}={value}"], kind=Assess)
    assert getattr(settings.read_settings(None, {key: True}, kind=Assess), key)


@pytest.mark.parametrize(("key", "value"), [("trust_network", True), ("ship", ["code"])])
def test_no_file_can_trust_a_network_or_send_files(key, value, tmp_path):
    path = tmp_path / "holdfast.yaml"
    option = f"--{key.replace('_', '-')}"
    for content in ({key: value}, {"assess": {key: value}}):
        path.write_text(json.dumps({"model": "mnist-cnn", "data": "mnist-mini", "on": "ray", **content}))
        with pytest.raises(UsageError, match=rf"holdfast\.yaml.* contains {key}.*{option}.*holdfast\.Ray\(…"):
            settings.read_settings(path, {}, kind=Assess)
    with pytest.raises(UsageError, match=rf"--set contains {key}.*{option}"):
        settings.read_settings(None, {}, [f"{key}=true"], kind=Assess)
    given = settings.read_settings(None, {"on": "ray://127.0.0.1:10001", key: value}, kind=Assess)
    assert getattr(given, key) == value


def test_the_key_on_of_a_file_is_text_in_every_version_of_yaml(tmp_path):
    path = tmp_path / "holdfast.yaml"
    path.write_text("model: mnist-cnn\ndata: mnist-mini\nassess:\n  on: ray\n  workers: 2\n")
    assert settings.read_settings(path, {}, kind=Assess).on == "ray"
    assert settings.read_settings(None, {}, ["on=ray"], kind=Assess).on == "ray"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"on": "slurm"}, "on is 'slurm'; expected local, ray, or ray://HOST:PORT"),
        ({"ship": ["a.py"]}, "ship concerns a Ray cluster, and the run is local; give on='ray'"),
        ({"mixed_nodes": True}, "mixed_nodes concerns a Ray cluster"),
        ({"gpus_per_worker": 1}, "gpus_per_worker concerns a Ray cluster"),
        ({"on": "ray", "gpus_per_worker": -1}, "gpus_per_worker is -1"),
        ({"on": "ray", "timeout": "soon"}, "timeout is 'soon'; expected a duration"),
    ],
)
def test_settings_of_a_cluster_are_checked(content, said):
    with pytest.raises(UsageError, match=said):
        settings.check_settings(content, "", kind=Assess)


def test_a_pool_does_not_leave_the_machine():
    with pytest.raises(UsageError, match="on is 'ray', and a pool .* keys .* leave out on$"):
        settings.check_settings({"on": "ray"}, "", kind=RotateSettings)
    assert settings.check_settings({"on": "local"}, "", kind=RotateSettings).on == "local"


def test_a_gate_on_a_verdict_is_valid_for_the_verb_that_reaches_it(tmp_path):
    path = tmp_path / "h.yaml"
    path.write_text("model: mnist-cnn\ndata: mnist-mini\nthreat: linf:0.3\ngates: [improved]\n")
    assert validate(path) == ("harden",)
    for kind in (Assess, Certify):
        with pytest.raises(UsageError, match="gate 'improved' is a verdict on a training"):
            settings.read_settings(path, {}, kind=kind)


@pytest.mark.parametrize("setting", [{"threat": "table:a\udcff.yaml"}, {"guard": "a\udcff.yaml"}])
def test_a_run_of_a_file_whose_name_is_not_utf_8_has_a_name(setting):
    given = Assess(**({"model": "net.pt", "data": "d.npz", "threat": "linf:0.1"} | setting))
    assert b"udcff" in canonical(settings.canonical_settings(given))


def test_settings_that_are_composed_have_their_defaults_checked():
    composed = compose_settings(Doctor, Serve(model="mnist-cnn"))
    assert composed.threat == Doctor().threat
    assert group_of(Serve(model="mnist-cnn"), ThreatSource).threat == Doctor().threat
    assert ThreatSource.model_json_schema()["properties"]["threat"]["default"] == "linf:8/255"
