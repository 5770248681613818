"""Queries of VNN-LIB: what they mean, where a mistake is, and files that are too large or too deep."""

import gzip
import time

import pytest

from holdfast.certifiers.vnnlib.reading import read_query
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from onnx_networks import query_text

BOX = [(-0.5, 0.5), (0.0, 1.0)]
DECLARED = (
    "(declare-const X_0 Real)\n(declare-const X_1 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n"
)
BOUNDED = query_text(2, 2, BOX)
LINES = BOUNDED.count("\n") + 1
VERSION_2 = """(vnnlib-version <2.0>)
(declare-network f
  (declare-input X float32 [1,2])
  (declare-output Y float32 [2])
)
(assert (and (>= X[0,0] -0.5) (<= X[0,0] 0.5) (>= X[0,1] 0.0) (<= X[0,1] 1.0)))
"""


def opened(tmp_path, text, name="query.vnnlib"):
    path = tmp_path / name
    path.write_text(text)
    return read_query(path)


def satisfied(query, x, y):
    """Whether one of the cases of a query is satisfied by inputs and outputs."""

    def value(function):
        terms = (
            factor * (x[key] if key >= 0 else y[-1 - key]) for key, factor in function.coefficients.items()
        )
        return sum(terms) + function.constant

    return any(
        all(x[i] >= bound for i, bound in case.low.items())
        and all(x[i] <= bound for i, bound in case.high.items())
        and all(value(c.function) < 0 if c.strict else value(c.function) <= 0 for c in case.constraints)
        for case in query.alternatives.all()
    )


@pytest.mark.parametrize(
    ("condition", "x", "y", "expected"),
    [
        ("(<= Y_0 Y_1)", (0, 0), (1, 1), True),
        ("(< Y_0 Y_1)", (0, 0), (1, 1), False),
        ("(>= Y_0 (+ Y_1 1 .5e0))", (0, 0), (2.5, 1), True),
        ("(>= (- Y_0 Y_1 1) 0.0)", (0, 0), (2.5, 1), True),
        ("(= (* 2 Y_0) (- (/ Y_1 4)))", (0, 0), (1, -8), True),
        ("(= (* 2 Y_0) (- (/ Y_1 4)))", (0, 0), (1, -7), False),
        ("(distinct Y_0 Y_1)", (0, 0), (1, 1), False),
        ("(not (or (<= Y_0 0) (> Y_1 0)))", (0, 0), (0.1, 0), True),
        ("(not (or (<= Y_0 0) (> Y_1 0)))", (0, 0), (0, 0), False),
        ("(=> (>= Y_0 0) (>= Y_1 0))", (0, 0), (-1, -1), True),
        ("(=> (>= Y_0 0) (>= Y_1 0))", (0, 0), (1, -1), False),
        (
            "(or (and (<= X_0 0.0) (<= Y_0 0)) (and (>= X_0 0.1) (or (<= Y_0 1) (<= Y_1 1))))",
            (0.2, 0),
            (2, 1),
            True,
        ),
        (
            "(or (and (<= X_0 0.0) (<= Y_0 0)) (and (>= X_0 0.1) (or (<= Y_0 1) (<= Y_1 1))))",
            (0.05, 0),
            (0, 0),
            False,
        ),
        ("(<= (* -2 X_0) -0.5)", (0.25, 0), (0, 0), True),
        ("(<= (* -2 X_0) -0.5)", (0.24, 0), (0, 0), False),
        ("(<= (+ X_0 X_1 Y_0) 1.0)", (0.5, 1), (-0.5, 0), True),
        ("(<= (+ X_0 X_1 Y_0) 1.0)", (0.5, 1), (-0.4, 0), False),
    ],
)
def test_conditions_have_the_meaning_of_smt_lib(tmp_path, condition, x, y, expected):
    assert satisfied(opened(tmp_path, BOUNDED + f"(assert {condition})"), x, y) is expected


def test_declarations_comments_and_commands_of_smt_lib_are_read(tmp_path):
    text = """; a comment (with parentheses
    (set-logic QF_LRA) (set-info :source |somewhere|)
    (declare-fun X_0 () Real) (declare-const Y_0 Real) ; another
    (assert (and (>= X_0 -1e-1)
                 (<= X_0 +1.))) (assert (<= Y_0 0)) (check-sat) (get-model) (exit)"""
    (case,) = opened(tmp_path, text).alternatives.all()
    assert (case.low, case.high, len(case.constraints)) == ({0: -0.1}, {0: 1.0}, 1)
    packed = tmp_path / "query.vnnlib.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert len(list(read_query(packed).alternatives.all())) == 1


@pytest.mark.parametrize(
    ("line", "column", "text", "message"),
    [
        (0, 13, "(assert (<= Z_0 1))", "'Z_0' is neither a number nor a declared variable"),
        (0, 9, "(assert (<= X_0))", "compares 2 values; 1 are given"),
        (0, 1, "(assert X_0)", "assert has one condition"),
        (0, 9, "(assert (and X_0))", "has conditions as arguments"),
        (0, 13, "(assert (<= (* X_0 X_1) 1))", "not linear"),
        (0, 13, "(assert (<= (/ 1 X_0) 1))", "division by a number other than 0"),
        (0, 10, "(assert (lte X_0 1))", "'lte' is not an operator"),
        (0, 2, "(asert (<= X_0 1))", "did you mean 'assert'"),
        (0, 1, "(declare-const X_0 Real)", "X_0 is declared twice"),
        (0, 1, "(declare-const X_2 Int)", "the type 'Int'; Real was expected"),
        (0, 1, "(declare-const Z Real)", "X_0, X_1, … for inputs"),
        (0, 19, "(assert (<= X_0 1)", "ends before 1 parentheses are closed"),
        (1, 3, "(assert\n  )(<= X_0 1))", "assert has one condition"),
        (0, 20, "(assert (<= X_0 1)))", "closes nothing"),
        (0, 17, "(assert (<= X_0 1e999))", "too large for a number"),
        (0, 1, "X_0", "outside of a command"),
        (0, 1, '"', "is not expected here"),
    ],
)
def test_a_mistake_is_reported_with_its_line_and_column(tmp_path, line, column, text, message):
    with pytest.raises(TargetError, match=message) as caught:
        opened(tmp_path, BOUNDED + text)
    if message != "assert has one condition" or line == 0:
        assert f"line {LINES + line}, column {column}: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DECLARED, "no lower bound for X_0.*bounds of all inputs"),
        (
            DECLARED + "(assert (>= X_0 0))(assert (or (<= X_0 1) (<= Y_0 1)))",
            "no upper bound for X_0|no lower bound for X_1",
        ),
        (BOUNDED + "(declare-const X_7 Real)", "declares X_7, but not X_2"),
        ("(declare-const X_0 Real)", "declares no output Y_0"),
        ("; nothing", "contains no command"),
        (BOUNDED + "(assert (or (<= Y_0 1) (<= Y_1 1)))" * 20, "262,144 cases.*split it"),
        (
            BOUNDED + "(assert " + "(not " * 200 + "(<= Y_0 1)" + ")" * 201,
            "more than 128 parentheses are open",
        ),
        ("(" * 100_000, "more than 128 parentheses are open"),
        ("\0", "is not expected here|operator|no VNN-LIB file|outside"),
    ],
)
def test_queries_that_are_incomplete_or_too_large_are_refused(tmp_path, text, message):
    with pytest.raises(TargetError, match=message):
        opened(tmp_path, text)


def test_binary_and_damaged_files_are_refused(tmp_path):
    for name, content in (
        ("a.vnnlib", b"\xff\xfe\x00"),
        ("b.vnnlib.gz", b"\x1f\x8b\x08damaged"),
        ("c.vnnlib.gz", b"text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TargetError, match="is no VNN-LIB file"):
            read_query(tmp_path / name)


@pytest.mark.slow
def test_the_time_is_linear_in_the_size_of_the_file(tmp_path):
    seconds = []
    for n in (2_000, 16_000):
        text = query_text(n, 1, [(0.0, 1.0)] * n, f"(<= (+ {' '.join(f'X_{i}' for i in range(n))}) 1.0)")
        start = time.process_time()
        opened(tmp_path, text)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 24 * seconds[0] + 0.1  # a quadratic reader takes 64 times


def test_nested_sums_do_not_take_quadratic_time(tmp_path):
    n = 120
    wide = " ".join(f"Y_{i % 2}" for i in range(2_000))
    nested = "(+ Y_0 " * n + f"(+ {wide})" + ")" * n
    start = time.process_time()
    opened(tmp_path, BOUNDED + f"(assert (<= {nested} 1.0))")
    assert time.process_time() - start < 2


# --- version 2


def test_version_2_has_the_same_meaning(tmp_path):
    pytest.importorskip("vnnlib", reason="the extra vnnlib is not installed")
    query = opened(tmp_path, VERSION_2 + "(assert (or (<= Y[0] (+ (* 2.0 Y[1]) 1.0)) (> (- Y[1]) 3.125)))")
    assert (query.version, query.inputs, query.outputs) == ("2.0", 2, 2)
    assert (query.networks[0].input.element_type, query.networks[0].input.shape) == ("float32", (1, 2))
    for y, expected in (((3, 1), True), ((3.1, 1), False), ((9, -3.125), False), ((9, -3.2), True)):
        assert satisfied(query, (0, 0), y) is expected
    assert not satisfied(query, (0.6, 0), (3, 1))
    assert [query.name_of(key) for key in (1, -2)] == ["X[0,1]", "Y[1]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(assert (<= X[0,7] 1.0))", "line 7: Index out of bounds.*X.0,7."),
        ("(assert (<= Z[0] 1.0))", "line 7: Undeclared variable Z"),
        ("(assert (<= X[0,1] 1e5))", "line 7, column 20: syntax error"),
        ("(assert (<= (* Y[0] Y[1]) 1.0))", "not linear"),
        ("(assert " + "(and " * 5000 + "(<= Y[0] 1.0)" + ")" * 5001, "more than 128 parentheses"),
    ],
)
def test_mistakes_in_version_2_are_reported_with_their_place(tmp_path, text, message):
    pytest.importorskip("vnnlib", reason="the extra vnnlib is not installed")
    with pytest.raises(TargetError, match=message):
        opened(tmp_path, VERSION_2 + text)


def test_hidden_nodes_and_several_inputs_are_refused(tmp_path):
    pytest.importorskip("vnnlib", reason="the extra vnnlib is not installed")
    hidden = '(declare-hidden H float32 [1] "h")'
    for old, new, message in (
        ("[1,2])\n", f"[1,2])\n{hidden}", "hidden node H"),
        ("[1,2])\n", "[1,2])\n(declare-input Z float32 [1])\n", "2 inputs and 1 outputs"),
    ):
        with pytest.raises(HoldfastError, match=message):
            opened(tmp_path, VERSION_2.replace(old, new) + "(assert (<= Y[0] 1.0))")


def test_version_2_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vnnlib", None)
    with pytest.raises(UsageError, match=r'pip install "holdfast-ml\[vnnlib\]"'):
        opened(tmp_path, VERSION_2)
