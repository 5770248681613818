"""The rules of a table: relations are parsed, rows are repaired, and the judge accepts exactly the valid changes."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.batch import Batch
from holdfast.core.constraints import allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.settings.table_rules import rules_from
from holdfast.threats.table_checking import checked, distances
from holdfast.threats.table_rules import parse_relation, rules_of
from holdfast.threats.tables import Table

CONTENT = {
    "columns": {
        "logins": {"type": "whole", "min": 0, "max": 20},
        "failed": {"type": "whole", "min": 0, "max": 20, "change": "down"},
        "debit": {"min": 0, "max": 100},
        "credit": {"min": 0, "max": 100, "cost": 2},
        "total": {"min": 0, "max": 200, "missing": True},
        "age": {"type": "whole", "min": 18, "max": 99, "change": "none"},
        "country": {"type": "category", "values": ["DE", "FR", "US"], "cost": 0.2},
        "card": {"type": "whole", "min": 0, "max": 1, "cost": 0.2},
        "cash": {"type": "whole", "min": 0, "max": 1, "cost": 0.2},
    },
    "budget": {"norm": "linf", "eps": 0.4},
    "groups": [["card", "cash"]],
    "relations": [
        "failed <= logins",
        "total == debit + credit",
        "if failed > 3 then logins >= 8",
        "max(debit, credit) <= 90 and debit * credit <= 4000",
        "abs(debit - credit) < 80",
    ],
}
CLEAN = np.array(
    [
        [10, 5, 20, 30, 50, 40, 0, 1, 0],
        [2, 1, 60, 1, 61, 18, 2, 0, 1],
        [8, 4, 0, 0, 0, 70, 1, 1, 0],
        [20, 0, 85, 40, np.nan, 99, 0, 0, 1],
    ],
    np.float32,
)
BOUNDS = Bounds(-torch.inf, torch.inf)


def table(norm="linf", eps=0.4, **changes):
    content = CONTENT | {"budget": {"norm": norm, "eps": eps}} | changes
    if norm == "l0":  # which counts columns, so that they have no costs
        columns = {name: {**column, "cost": 1} for name, column in content["columns"].items()}
        content = content | {"columns": columns}
    rules = rules_from(content, "rules.yaml")
    return Table("rules.yaml", rules.content, eps)


def follows_rules(row, clean):
    """Return whether a row is a valid change, written out by hand, without regard to the budget."""
    logins, failed, debit, credit, total, age, country, card, cash = map(float, row)
    within = 0 <= logins <= 20 and 0 <= debit <= 100 and 0 <= credit <= 100 and country in (0, 1, 2)
    whole = logins % 1 == failed % 1 == 0
    relations = failed <= logins and (failed <= 3 or logins >= 8)
    relations = relations and max(debit, credit) <= 90 + 1e-4 and debit * credit <= 4000 + 4e-2
    relations = relations and abs(debit - credit) < 80
    adds_up = np.isnan(total) or abs(total - debit - credit) <= 1e-3
    unchanged = age == clean[5] and failed <= clean[1] and np.isnan(total) == np.isnan(clean[4])
    return within and whole and relations and adds_up and unchanged and {card, cash} == {0.0, 1.0}


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.4), ("l2", 0.7), ("l1", 0.9), ("l0", 3)])
@given(seed=st.integers(0, 10_000))
def test_every_point_becomes_a_valid_change(norm, eps, seed):
    constraint, clean = table(norm, eps), torch.from_numpy(CLEAN).repeat(8, 1)
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=clean.shape) * 30).float()
    batch = Batch(clean, torch.zeros(len(clean), dtype=torch.int64), torch.arange(len(clean)))
    for x_adv in (
        constraint.project(clean + noise, clean, BOUNDS),
        constraint.sample(batch, BOUNDS, Draws(seed)),
    ):
        assert allowed(constraint, x_adv, clean, BOUNDS).all()
        assert all(map(follows_rules, x_adv.numpy(), clean.numpy()))


def test_a_projection_uses_the_budget():
    constraint, clean = table(), torch.from_numpy(CLEAN[:1])
    wanted = clean.clone()
    wanted[0, 0], wanted[0, 2], wanted[0, 6] = 19, 60, 1
    x_adv = constraint.project(wanted, clean, BOUNDS)
    assert x_adv[0, [0, 1, 2, 3, 4, 6]].tolist() == [18, 5, 60, 30, 90, 1]
    assert float(constraint.distance(x_adv, clean)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("logins", 4), ("logins", 10.5), ("logins", 21), ("failed", 6), ("debit", 21), ("age", 41), ("country", 3),
        ("country", 0.5), ("card", 0), ("cash", 1), ("total", np.nan), ("total", 50.1),
    ],
)  # fmt: skip
def test_the_judge_refuses_a_row_that_violates_a_rule(column, value):
    rules, row = table(eps=100).rules, CLEAN[:1].astype(float).copy()
    assert distances(rules, row, row).tolist() == [0]
    row[0, rules.places[column]] = value
    assert np.isinf(distances(rules, row, CLEAN[:1].astype(float)))


def test_the_judge_measures_changes_in_the_budget():
    clean = CLEAN[:1].astype(float)
    changed = clean.copy()
    # 0.2 of a range, 0.05 at cost 2, 0.025, and twice the cost 0.2
    changed[0, [0, 3, 4, 6, 7, 8]] = np.array([14, 35, 55, 1, 0, 1])
    for norm, size in (("linf", 0.2), ("l1", 0.725), ("l0", 5)):
        assert distances(table(norm, eps=3).rules, changed, clean).tolist() == pytest.approx([size])


def test_a_rule_that_the_clean_row_violates_is_reported_and_not_applied():
    constraint, clean = table(), torch.from_numpy(CLEAN[:2].copy())
    clean[0, 4] = 51  # the total is wrong
    x_adv = constraint.project(clean + 1, clean, BOUNDS)
    assert allowed(constraint, x_adv, clean, BOUNDS).all()
    assert (x_adv != clean).any(1).all()
    notes = checked(constraint.rules, clean.double().numpy()).notes(2)
    assert notes == (
        "1 of 2 clean rows violate the rule 'total == debit + credit', which is not applied to changes of these rows",
    )


def test_a_limit_is_extended_to_a_clean_value_outside_it():
    content = {"columns": {"a": {"min": 0, "max": 10}}, "budget": {"eps": 9}}
    rules = rules_from(content, "r")
    clean, changed = np.array([[20.0]] * 4), np.array([[20.0], [5.0], [21.0], [-1.0]])
    assert np.isinf(distances(rules, changed, clean)).tolist() == [False, False, True, True]
    x = torch.tensor(clean).float()
    x_adv = Table("r", rules.content, 9).project(torch.tensor(changed).float(), x, BOUNDS)
    assert x_adv.flatten().tolist() == [20, 5, 20, 0]


def test_relations_that_always_hold_and_columns_that_cannot_change_are_reported():
    columns = CONTENT["columns"] | {"country": CONTENT["columns"]["country"] | {"cost": 1}}
    relations = ["logins >= 0", "if debit > 100 then credit > 5", "failed <= logins"]
    rules = table(relations=relations, columns=columns).rules
    check = checked(rules, CLEAN.astype(float))
    assert check.idle == ("logins >= 0", "if debit > 100 then credit > 5")
    assert check.fixed == ("country",)


def test_a_division_by_zero_violates_a_relation():
    columns = {"loan": {"min": 0, "max": 1000}, "income": {"min": 0, "max": 100}}
    content = {"columns": columns, "budget": {"norm": "l0", "eps": 2}, "relations": ["loan / income <= 0.5"]}
    rules = rules_from(content, "r")
    clean = np.array([[10.0, 100.0]] * 3)
    changed = np.array([[900.0, 0.0], [0.0, 0.0], [40.0, 90.0]])
    assert distances(rules, changed, clean).tolist() == [np.inf, np.inf, 2]
    constraint, x = Table("r", rules.content, 2), torch.tensor(clean).float()
    x_adv = constraint.project(torch.tensor(changed).float(), x, BOUNDS)
    assert allowed(constraint, x_adv, x, BOUNDS).all()


def test_tolerances_are_relative_to_the_values():
    columns = {"a": {"min": 0, "max": 1e-7}, "b": {"min": 0, "max": 1e9}}
    rules = rules_from({"columns": columns, "budget": {"eps": 9}, "relations": ["a <= b"]}, "r")
    clean = np.array([[0.0, 0.0]] * 4)
    changed = np.array([[9e-7, 1.0], [0.0, -999.0], [1e-7, 0.0], [1e-7, 1e-7]])
    assert np.isinf(distances(rules, changed, clean)).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("debit <= 1" + "0" * 400, "a number is larger"),
        ("debit <= 1e999", "a number is larger"),
        ("debit", "a comparison is missing"),
        ("debit != credit", "another comparison"),
        ("debit ** 2 <= 3", "is not an expression"),
        ("__import__('os').system('ls') <= 3", "is not an expression"),
        ("debit <= ", "cannot be parsed"),
        ("min(debit) <= 3", "min has 1 arguments"),
        ("(" * 300 + "debit" + ")" * 300 + " <= 3", "cannot be parsed"),
        ("-" * 500 + "debit <= 3", "nested too deeply"),
        ("debit <= True", "True and False"),
        ("debit <= 3 " * 400, "characters"),
    ],
)
def test_other_texts_are_no_relations(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_relation(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {}}, "has no columns"),
        ({"columns": {"a": {"min": 2, "max": 1}}}, "min 2 above max 1"),
        ({"columns": {"a": {"min": 0}}}, "has one limit"),
        ({"columns": {"a": {}}}, "has no limits"),
        ({"columns": {"a": {"type": "category"}}}, "its values were expected"),
        (
            {"columns": {"a": {"type": "category", "values": ["x", "y"], "change": "up"}}},
            "no min, max, unit or direction",
        ),
        ({"columns": {"a": {"min": 0, "max": 1, "values": ["x"]}}}, "has values, which only a category has"),
        ({"columns": {"a": {"min": 0, "max": 1, "change": "none"}}, "groups": [], "relations": []}, "nothing can be"),
        ({"columns": {"a": {"min": 0, "max": 1, "colour": "red"}}}, "columns.a.colour"),
        ({"columns": {"a": {"min": 0, "max": 1, "cost": 0}}}, "columns.a.cost"),
        ({"relations": ["failed <= login"]}, "did you mean 'logins'"),
        ({"relations": ["country <= 1"]}, "which is a category"),
        ({"relations": ["1 <= 2"]}, "has no column"),
        ({"columns": {"a": {"min": 0, "max": 1, "cost": float("inf")}}}, "finite numbers"),
        ({"columns": {"a": {"type": "whole", "min": 0.2, "max": 0.8}}}, "no whole number"),
        ({"columns": {"a": {"type": "category", "values": ["", "b"]}}}, "its values were expected"),
        (
            {"columns": {name: {"type": "whole", "min": 0, "max": 1, "change": "up"} for name in "ab"},
             "groups": [["a", "b"]], "relations": []},
            "rises when another falls",
        ),
        ({"groups": [["card"]]}, "has one column"),
        ({"groups": [["card", "logins"]]}, "expected type: whole, min: 0, max: 1"),
        ({"groups": [["card", "cash"], ["cash", "card"]]}, "in two groups"),
        ({"budget": {"norm": "l0", "eps": 1.5}}, "so it must be whole"),
        ({"budget": {"norm": "l0", "eps": 1}}, "l0 counts each changed column once"),
        ({"budget": {"norm": "l2", "eps": float("inf")}}, "a finite number"),
        ({"budget": {"eps": 0}}, "budget.eps"),
    ],
)  # fmt: skip
def test_rules_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        rules_from(CONTENT | change, "rules.yaml")


@pytest.mark.parametrize(
    ("most", "more", "message"),
    [
        (["debit < 9"] * 1000, ["debit < 9"], "1,001 relations; at most 1,000"),
        ([" or ".join(["debit < 9"] * 40)] * 50, ["debit < 9"], "2,001 comparisons; at most 2,000"),
        ([f"{'debit':<996} < 9"] * 100, ["debit < 9"], "100,009 characters; at most 100,000"),
    ],
)
def test_relations_are_accepted_up_to_their_limits(most, more, message):
    rules = rules_from(CONTENT | {"relations": most}, "rules.yaml")
    assert len(rules.relations) == len(most)
    with pytest.raises(UsageError, match=rf"rules.yaml'? ha(s|ve) {message} were expected"):
        rules_from(CONTENT | {"relations": most + more}, "rules.yaml")
    stored = json.loads(rules.content)
    stored["relations"] += more
    with pytest.raises(UsageError, match="at most"):
        rules_of(json.dumps(stored))


def test_rules_are_stored_and_read_again():
    rules = rules_from(CONTENT, "rules.yaml")
    assert rules_of(rules.content) == rules
    damaged = json.loads(rules.content)
    damaged["columns"]["logins"]["min"] = "many"
    forged = [
        rules.content.replace(old, new, 1)
        for old, new in (
            ('"whole"', "[1]"),
            ('"linf"', '"foo"'),
            ('"eps":0.4', '"eps":-1'),
            ('"cost":1.0', '"cost":-1'),
        )
    ]
    assert rules.content not in forged
    for content in ("{", "[]", json.dumps(damaged), *forged):
        with pytest.raises((TargetError, UsageError)):
            rules_of(content)
