"""Every law on every attack."""

from contextlib import nullcontext

import pytest

import cases
from holdfast import attacks
from holdfast.attacks import APGD, DDN, FAB, PGD, CarliniWagner, DeepFool, Square
from holdfast.attacks.parts.losses import dlr
from holdfast.core.constraints import L0, L1, L2, Linf
from holdfast.core.errors import UsageError
from holdfast.testing import laws
from holdfast.testing.laws import Case
from holdfast.testing.shapes import unchecked

STRONG = {
    laws.agrees_with_exact_distances,
    laws.returns_successful_queries,
    laws.works_for_any_number_of_classes,
    laws.takes_inputs_of_any_shape,
    laws.reaches_targets,
    laws.breaks_an_undefended_network,
}
"""The laws that ask how much an attack breaks, and so need its whole strength."""

SIZES = {
    laws.stays_inside,
    laws.works_for_any_number_of_classes,
    laws.takes_inputs_of_any_shape,
    laws.handles_unusual_batches,
}
"""The laws with inputs of several types and sizes; only there shapes are checked, which takes a quarter of the time."""


OF_THE_ATTACK = {
    laws.is_reproducible,
    laws.does_not_change_the_model,
    laws.does_not_change_its_arguments,
    laws.needs_only_the_declared_access,
    laws.works_for_any_number_of_classes,
}
"""The laws of the attack's own code, which is the same under every norm: one norm is enough."""


def shapes_checked(law):
    return nullcontext() if law in SIZES else unchecked()


def of_each(listed, all_laws):
    """The cases with their laws, as parameters. Slow are all but the first norm of each attack, and the laws of
    strength for attacks that search or estimate gradients, which need many queries.
    """
    first = {(type(case.attack), case.variant): case for case in reversed(listed)}.values()
    parameters = []
    for case in listed:
        for law in all_laws:
            if law in OF_THE_ATTACK and case not in first:
                continue
            quick = (
                case in first and not case.variant and (law not in STRONG or case.attack.needs == "gradients")
            )
            marks = () if quick else pytest.mark.slow
            parameters.append(pytest.param(case, law, marks=marks, id=f"{case!r}-{law.__name__}"))
    return parameters


@pytest.mark.parametrize(("case", "law"), of_each(cases.ATTACKS, laws.ATTACK_LAWS))
def test_law(case, law):
    with shapes_checked(law):
        law(case if law in STRONG else cases.brief(case))


@pytest.mark.parametrize(("case", "law"), of_each(cases.LIMITED, laws.LIMITED_LAWS))
def test_law_of_what_is_no_ball(case, law):
    with shapes_checked(law):
        law(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weaker, stronger, norms",
    [
        (PGD(steps=8), PGD(steps=8, restarts=4), (Linf, L2, L1, L0)),
        (APGD(steps=8), APGD(steps=8, restarts=3), (Linf, L2, L1)),
        (APGD(loss=dlr, steps=8, targets=1), APGD(loss=dlr, steps=8, targets=3), (Linf, L2, L1)),
        (FAB(steps=8, targets=1), FAB(steps=8, targets=3), (Linf, L2, L1)),
        (FAB(steps=5), FAB(steps=5, restarts=3), (Linf, L2, L1)),
        (Square(queries=20, scale_schedule=False), Square(queries=80, scale_schedule=False), (Linf, L2, L1)),
    ],
    ids=["PGD-restarts", "APGD-restarts", "APGD-targets", "FAB-targets", "FAB-restarts", "Square-queries"],
)
def test_more_never_loses(weaker, stronger, norms):
    with unchecked():
        for norm in norms:
            laws.breaks_all_that_a_weaker_one_breaks(weaker, stronger, norm)


def test_every_attack_of_the_catalogue_has_its_cases():
    ruled = {type(case.attack).__name__ for case in (*cases.ATTACKS, *cases.LIMITED)}
    elsewhere = {
        "AdversarialPatch",
        "ByteSearch",
        "CAPGD",
        "ColumnSearch",
        "Corruption",
        "FeatureTransfer",
        "GeneticSearch",
        "StandIn",
        "TextSearch",
        "TriggerStamp",
        "Universal",
        "UniversalDeepFool",
    }  # in tests/attacks
    assert ruled == set(attacks.__all__) - elsewhere


@pytest.mark.parametrize(
    "attack, norm",
    [
        (DDN(), Linf),
        (DDN(), L1),
        (CarliniWagner(), L1),
        (CarliniWagner(), L0),
        (DeepFool(), L0),
        (FAB(), L0),
        (Square(), L0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_norm_that_an_attack_is_not_made_for_is_refused_by_name(attack, norm):
    case = Case(attack, norm)
    assert repr(case) not in map(repr, cases.ATTACKS)
    model, batch, threat = laws.problem(case, n=2)
    with pytest.raises(
        UsageError, match=rf"{type(attack).__name__} .*; the threat model is {norm.__name__.lower()}:"
    ):
        laws.run(case, model, batch, threat)


def test_no_line_is_there_twice():
    lines = [repr(case) for case in cases.ATTACKS]
    assert len(set(lines)) == len(lines)
