"""Arguments in another place or under another name are refused with the right spelling."""

import pytest
import torch

import holdfast
from holdfast.cli.app import run
from holdfast.core.errors import UsageError
from holdfast.verbs.opening.arguments import with_eps

NET = torch.nn.Linear(4, 3)
X = torch.rand(8, 4)
Y = NET(X).argmax(1)


@pytest.mark.parametrize("verb", ["assess", "certify", "harden", "doctor"])
@pytest.mark.parametrize("labels", [Y, Y.numpy(), Y.tolist()], ids=["tensor", "array", "list"])
def test_labels_are_a_part_of_the_data(verb, labels):
    function = getattr(holdfast, verb)
    for call in (lambda: function(NET, X, labels), lambda: function(NET, x=X, y=labels)):
        with pytest.raises(UsageError, match=rf"holdfast.{verb}\(model, \(x, y\)\)"):
            call()


def test_attack_has_an_argument_for_labels():
    with pytest.raises(UsageError, match=r"holdfast.attack\(model, x, y, 'pgd'\)"):
        holdfast.attack(NET, (X, Y), "pgd")
    assert len(holdfast.attack(NET, (X, Y), attack="fgsm")) == len(X)


def test_settings_are_given_where_an_attack_is_named():
    def steps(attack, **settings):
        return holdfast.attack(NET, X, Y, attack, **settings).result.attacks[0].settings["steps"]

    assert (
        steps("pgd", steps=3) == steps(holdfast.attacks.PGD, steps=3) == steps({"use": "pgd"}, steps=3) == 3
    )
    with pytest.raises(UsageError, match="pgd has no setting 'step'; did you mean 'steps'"):
        steps("pgd", step=3)
    with pytest.raises(UsageError, match=r"give PGD\(steps=...\)"):
        steps(holdfast.attacks.PGD(), steps=3)
    for several in ("standard", "pgd,square", ["pgd", "square"]):
        with pytest.raises(UsageError, match="is a setting of one attack"):
            steps(several, steps=3)


@pytest.mark.parametrize(
    ("threat", "eps", "text"),
    [
        (None, 8 / 255, "linf:8/255"),
        ("l2", 0.5, "l2:0.5"),
        ("l2:1,queries=20", 0.5, "l2:0.5,queries=20"),
        (holdfast.L1(3), 2, "l1:2"),
        ("linf:8/255", "4/255", "linf:4/255"),
    ],
)
def test_eps_is_a_part_of_the_threat(threat, eps, text):
    assert with_eps(threat, eps) == text


@pytest.mark.parametrize(
    ("words", "spelling"),
    [
        (["--eps", "8/255"], "give --threat linf:8/255"),
        (["--eps=0.1"], "give --threat linf:0.1"),
        (["--attack", "pgd"], "give --suite pgd"),
        (["--steps", "10"], "give --set 'attacks=[{use: PGD, steps: 10}]'"),
        (["--gates", "x"], "give --gate x"),
        (["--eps"], "give --threat linf:VALUE"),
        (["--norm", "l2"], "give --threat l2:EPS"),
        (["--bounds", "0", "255"], "give --bounds 0,255"),
        (["--time", "60s"], "give --time-budget 60s"),
        (["harden", "--time", "60s"], "give --budget 60s"),
        (["harden", "--epochs", "3"], "give --set recipe.training.epochs=3"),
        (
            ["certify", "--no-doubts"],
            "no such option '--no-doubts'; it is an option of assess, harden, adapt; see",
        ),
        (
            ["--non-members", "others.npz"],
            "no such option '--non-members'; it is an option of audit membership; see",
        ),
    ],
)
def test_options_of_other_programs_are_refused_with_their_spelling(words, spelling, capsys):
    verb, *options = words if words[0] in ("harden", "certify") else ("assess", *words)
    assert run([verb, "mnist-cnn", "mnist-mini", *options]) == 2
    assert spelling in capsys.readouterr().err


def test_a_file_of_code_needs_the_name_of_a_function(tmp_path):
    path = tmp_path / "net.py"
    path.write_text("raise ImportError\n\ndef helper(x): return x\n\ndef make(width=3): return None\n")
    torch.save(NET.state_dict(), tmp_path / "w.pt")
    for model in (str(path), holdfast.open_model(str(tmp_path / "w.pt"), arch=str(path))):
        with pytest.raises(UsageError, match=r"it defines make, helper: give .*net\.py:make"):
            holdfast.doctor(model, (X, Y))
    path.write_text("net = 3\n")
    with pytest.raises(UsageError, match=r"give .*net\.py:make, and define it"):
        holdfast.doctor(str(path), (X, Y))


@pytest.mark.parametrize(
    ("function", "arguments", "spelling"),
    [
        ("assess", {"norm": "l2", "eps": 0.5}, "give threat='l2:0.5'"),
        ("assess", {"eps": 0.5, "norm": 2}, "give threat='l2:0.5'"),
        ("certify", {"norm": float("inf")}, "give threat='linf:8/255'"),
        ("attack", {"norm": "Linf", "y": Y}, "give threat='linf:8/255'"),
        ("assess", {"attacks": ["pgd", "fgsm"]}, "give suite='pgd,fgsm'"),
        ("assess", {"attacks": [holdfast.attacks.PGD(steps=5), "fgsm"]}, r"suite=\[PGD\(steps=5\), 'fgsm'\]"),
        ("attack", {"attacks": ["pgd"], "y": Y}, "give attack='pgd'"),
        ("harden", {"time": 30}, "give budget='30s'"),
        ("harden", {"budget": 30}, "give budget='30s'"),
        ("assess", {"time_limit": 30}, "give time_budget='30s'"),
        ("harden", {"epochs": 5}, r"give recipe=\{'use': 'pgd', 'training': \{'epochs': 5\}\}"),
        ("assess", {"gates": "clean_accuracy >= 0.1"}, r"give gates=\('clean_accuracy >= 0.1',\)"),
        ("assess", {"gates": "clean_accuracy > 0.1"}, r"give gates=\('clean_accuracy >= 0.1',\)"),
        ("assess", {"gates": "clean_acuracy > 0.1"}, r"did you mean 'clean_accuracy'"),
        ("assess", {"gate": "clean_accuracy > 0.1"}, r"give gates=\('clean_accuracy >= 0.1',\)"),
        ("assess", {"sead": 1}, "assess has no argument 'sead'; did you mean 'seed'"),
    ],
)
def test_arguments_of_other_libraries_are_refused_with_their_spelling(function, arguments, spelling):
    data = X if function == "attack" else (X, Y)
    with pytest.raises(UsageError, match=spelling):
        getattr(holdfast, function)(NET, data, **arguments)


@pytest.mark.parametrize(
    ("threat", "spelling"),
    [
        ("linf=0.1", "linf:0.1"),
        ("Linf(8/255)", "linf:8/255"),
        ("linf,0.1,access=scores", "linf:0.1,access=scores"),
        ("norm=l2,eps=0.5", "l2:0.5"),
        ("0.1", "linf:0.1"),
        (0.1, "linf:0.1"),
    ],
)
def test_a_threat_without_a_colon_is_refused_with_its_spelling(threat, spelling):
    with pytest.raises(UsageError, match=f"give threat='{spelling}'$"):
        holdfast.assess(NET, (X, Y), threat)


@pytest.mark.parametrize("threat", ["l3:0.1", "linf:-0.1", "linf:0.1:0.2", "l3=0.1", "soon"])
def test_no_spelling_is_named_for_other_texts(threat):
    with pytest.raises(UsageError) as refused:
        holdfast.assess(NET, (X, Y), threat)
    assert not refused.value.remedies


@pytest.mark.parametrize(
    ("threat", "spelling"),
    [
        ("linf:25.5", r"linf:0.1' \(the given eps divided by 255\)"),
        ("linf:8,access=scores", "linf:8/255,access=scores'"),
        ("linf:300", "linf:8/255'$"),
        ("l0:5", "l0:1'$"),
    ],
)
def test_an_eps_beyond_the_bounds_is_divided_by_255(threat, spelling):
    with pytest.raises(UsageError, match=f"give threat='{spelling}"):
        holdfast.assess(NET, (X, Y), threat, suite="square")


@pytest.mark.parametrize(
    ("model", "data"), [("mnist-mini", "mnist-cnn"), ("test.npz", "weights.pt"), ("t.csv", "net.py:make")]
)
@pytest.mark.parametrize("verb", ["assess", "doctor"])
def test_a_model_and_data_that_are_swapped_are_named(verb, model, data, capsys):
    assert run([verb, model, data]) == 2
    assert "they seem to be swapped: give the model first and then the data" in capsys.readouterr().err
