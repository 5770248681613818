"""A model that is swapped while it serves: no batch of two sets, no request that fails, no answer uncounted."""

import random
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from holdfast.core.errors import Inconclusive, TargetError, UsageError
from holdfast.core.model import Classifier, Model
from holdfast.rotation.rotating_model import (
    Answers,
    AnswersPerPrincipal,
    Live,
    RotatingModel,
    canary,
    churn,
    loaded,
    refuse_strange,
)
from holdfast.rotation.steps.serving_set import next_set
from holdfast.testing import fakes

X = fakes.examples(1, n=24).x


class Pool:
    """What gives the current set: some networks by name, and the one of them that is to serve."""

    def __init__(self, canaries=X, **models):
        self.models, self.canaries, self.changed = models, canaries, {}
        self.name, self.epoch = next(iter(models)), 1

    def serve(self, name):
        self.name, self.epoch = name, self.epoch + 1

    def known(self, name):
        return canary(self.models[name], self.canaries)

    def __call__(self):
        weights = self.changed.get(self.name, self.models[self.name].net.state_dict())
        return Live(self.name, self.epoch, weights, self.known(self.name))


def pool(**more):
    return Pool(**{name: fakes.network(seed) for seed, name in enumerate("abcdefghijkl")}, **more)


def rotating(sets, **settings):
    return RotatingModel(fakes.network(99), sets, sets.canaries, **settings)


def swap(model, sets, name):
    sets.serve(name)
    assert model.refresh()
    assert not model.refresh()


# --- a model


def test_it_is_a_model_that_answers_as_the_current_set():
    sets = pool()
    model = rotating(sets)
    assert isinstance(model, Model)
    assert model.bounds == sets.models["a"].bounds
    for epoch, name in enumerate("abbca", 1):
        if epoch > 1:
            swap(model, sets, name)
        assert model.live == (name, epoch)
        assert torch.equal(model(X, torch.arange(24)), sets.models[name](X))
        assert torch.equal(model.answer(X, principal="p"), sets.models[name](X))


def test_preprocessing_stays_that_of_the_architecture():
    given = fakes.network(0)
    scaled = Classifier(given.net, mean=(0.5, 0.25, 0.1), std=(0.5, 2.0, 1.0)).eval()
    weights = fakes.network(3).net.state_dict()
    wanted = Classifier(fakes.network(3).net, mean=(0.5, 0.25, 0.1), std=(0.5, 2.0, 1.0)).eval()
    model = RotatingModel(scaled, lambda: Live("a", 1, weights, canary(wanted, X)), X)
    assert torch.equal(model(X), wanted(X))


def test_gradients_reach_the_input_and_no_weight():
    model = rotating(pool())
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.answer(x, principal="p").sum(), x)
    (known,) = torch.autograd.grad(fakes.network(0)(x).sum(), x)
    assert torch.equal(slope, known)
    assert not model(X).requires_grad
    trained = fakes.network(0).train().requires_grad_()
    asked = RotatingModel(trained, pool(), X)
    assert not asked(X).requires_grad
    assert trained.training
    assert all(weight.requires_grad for weight in trained.parameters())


def test_an_answer_does_not_reveal_the_epoch():
    sets = pool()
    model = rotating(sets)
    first = model(X)
    swap(model, sets, "b")
    swap(model, sets, "a")
    again = model(X)
    assert torch.equal(first, again)
    assert type(again) is torch.Tensor
    assert not vars(again)


def test_the_given_weights_and_architecture_are_copied():
    sets, base = pool(), fakes.network(99)
    model = RotatingModel(base, sets, X)
    before = model(X)
    with torch.no_grad():
        for tensor in (*sets.models["a"].parameters(), *base.parameters()):
            tensor.zero_()
    assert torch.equal(model(X), before)
    swap(model, sets, "b")
    assert torch.equal(model(X), sets.models["b"](X))


def test_the_statistics_of_batch_norm_are_part_of_a_set():
    def normed(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
        net(X * (seed + 1))  # in train mode, so that the statistics are of this
        return Classifier(net).eval()

    sets = Pool(a=normed(1), b=normed(2))
    model = RotatingModel(normed(0), sets, X)
    for name in "aba":
        swap(model, sets, name)
        assert torch.equal(model(X), sets.models[name](X))
        assert torch.equal(model(X[:1]), sets.models[name](X[:1]))


def test_a_loaded_copy_is_frozen_and_the_model_stays_as_it_is():
    given, weights = fakes.network(0).train().requires_grad_(), fakes.network(1).net.state_dict()
    copied = loaded(given, weights, "a")
    assert not copied.training
    assert not any(weight.requires_grad for weight in copied.parameters())
    assert given.training
    assert all(weight.requires_grad for weight in given.parameters())
    assert torch.equal(copied(X), fakes.network(1)(X))
    assert torch.equal(given(X), fakes.network(0)(X))


# --- what is refused


def spoiled(change):
    weights = {name: value.clone() for name, value in fakes.network(1).net.state_dict().items()}
    change(weights)
    return weights


def put_nan(weights):
    weights["1.weight"][0, 0] = torch.nan


SPOILED = {
    "nan": (put_nan, "1.weight"),
    "shape": (lambda w: w.update({"1.bias": torch.zeros(15).double()}), r"1.bias .*\(15,\).*\(16,\)"),
    "missing": (lambda w: w.pop("3.bias"), "3.bias"),
    "extra": (lambda w: w.update(more=torch.zeros(1)), "more"),
    "dtype": (lambda w: w.update({"3.weight": w["3.weight"].float()}), "3.weight .*float32.*float64"),
    "damaged": (lambda w: w["1.weight"].neg_(), r"the 24 canary inputs have the digest \w+…, but \w+… was"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_set_that_is_not_in_order_leaves_the_old_one_serving(kind):
    change, says = SPOILED[kind]
    sets = pool()
    model = rotating(sets)
    sets.changed["b"] = spoiled(change)
    sets.serve("b")
    for _ in range(2):
        with pytest.raises(TargetError, match=rf"set 'b' .*{says}.*; set 'a' still serves"):
            model.refresh()
        assert model.live == ("a", 1)
        assert torch.equal(model(X), sets.models["a"](X))
    swap(model, sets, "c")
    assert model.live == ("c", 3)


def test_a_first_set_that_fails_its_checks_does_not_serve():
    sets = pool()
    sets.changed["a"] = spoiled(put_nan)
    with pytest.raises(TargetError, match="set 'a' .*1.weight"):
        rotating(sets)


def test_a_store_that_fails_leaves_the_old_set_serving():
    sets = pool()

    def current():
        if sets.name == "b":
            raise TargetError("entry 7 of the ledger does not follow from entry 6")
        return sets()

    model = RotatingModel(fakes.network(), current, X)
    sets.serve("b")
    with pytest.raises(TargetError, match="entry 7"):
        model.refresh()
    assert torch.equal(model(X), sets.models["a"](X))


def test_an_epoch_is_never_repeated():
    sets = pool()
    model = rotating(sets)
    swap(model, sets, "b")
    for name, epoch in (("a", 1), ("a", 2), ("b", 1)):
        sets.name, sets.epoch = name, epoch
        with pytest.raises(
            TargetError, match=f"'{name}' has epoch {epoch}, but 3 or later .* 'b' still serves"
        ):
            model.refresh()
    assert model.live == ("b", 2)


def test_canaries_are_needed_and_known():
    sets = pool()
    with pytest.raises(UsageError, match="no canary inputs"):
        RotatingModel(fakes.network(), sets, X[:0])
    with pytest.raises(TargetError, match="set 'a' has the canary 'abc'; expected 64 hex digits"):
        RotatingModel(fakes.network(), lambda: Live("a", 1, fakes.network().net.state_dict(), "abc"), X)


def test_a_canary_compares_classes_and_no_logits():
    model = fakes.network(0)
    known = canary(model, X)
    assert known == canary(lambda x, ids=None: model(x) * (1 + 1e-6), X)
    assert known == canary(lambda x, ids=None: torch.cat([model(row[None]) for row in x]), X)
    assert known != canary(fakes.network(1), X)


def test_canaries_that_are_too_close_to_call_are_left_out():
    tied = torch.eye(3).repeat(4, 1)
    tied[5, 0] = tied[5].max() - 1e-4
    known = canary(lambda x, ids=None: tied, X[:12])
    assert known.endswith("/5")
    other = tied.clone()
    other[5, 0] += 1.0  # where it is left out anything may be said
    refuse_strange(lambda x, ids=None: other, X[:12], known, "a")
    with pytest.raises(
        TargetError, match="0 of 12 canary inputs clearly; at least half of them were expected"
    ):
        canary(lambda x, ids=None: torch.zeros(12, 3), X[:12])
    with pytest.raises(TargetError, match="the logits of 1 of 12 canary inputs are NaN"):
        canary(lambda x, ids=None: tied.clone().index_fill_(0, torch.tensor(3), torch.nan), X[:12])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x))


class Sharing(nn.Linear):
    def __deepcopy__(self, memo):
        return self


def test_models_that_cannot_be_swapped_are_named():
    with pytest.raises(TargetError, match="no parameters to swap; give a network"):
        loaded(Classifier(lambda x: x.flatten(1)), {}, "a")
    with pytest.raises(TargetError, match="LazyLinear|Uninitialized"):
        loaded(Classifier(nn.LazyLinear(3)), {}, "a")
    shares = Classifier(Sharing(4, 3))
    with pytest.raises(TargetError, match="a copy of the model shares its weights"):
        loaded(shares, shares.net.state_dict(), "a")
    tied = Tied().state_dict()
    loaded(Classifier(Tied()), tied, "a")
    with pytest.raises(
        TargetError, match="set 'a' contains values of one.weight that the network did not keep"
    ):
        loaded(Classifier(Tied()), {**tied, "other.weight": tied["one.weight"] + 1}, "a")


# --- threads


BETWEEN = threading.local()
"""what a thread does between the first and the last layer of `Numbered`"""


class Numbered(nn.Module):
    """Logits that tell which set they come from, once by the first layer and once by the last."""

    def __init__(self, number=0):
        super().__init__()
        self.first = nn.Parameter(torch.tensor(float(number)))
        self.last = nn.Parameter(torch.tensor(float(number)))

    def forward(self, x):
        first = self.first.expand(len(x)).clone()
        getattr(BETWEEN, "act", lambda: None)()
        return torch.stack((first, self.last.expand(len(x)), torch.full_like(first, 1e6)), 1)


def whole(logits):
    """Whether every row and every layer of an answer is of one set."""
    return bool((logits[:, :2] == logits[0, 0]).all())


def numbered(n=6):
    return Pool(torch.rand(4, 2), **{f"set {k}": Classifier(Numbered(k)).eval() for k in range(n)})


def swapped_under_way(ask, swap):
    """The answer to a request that waits between two layers until another thread has swapped."""
    entered, swapped = threading.Event(), threading.Event()

    def wait():
        entered.set()
        assert swapped.wait(60)

    def request():
        BETWEEN.act = wait
        return ask(torch.zeros(5, 2))

    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(request)
        assert entered.wait(60)
        swap()
        swapped.set()
        return answer.result(60)


def test_a_request_finishes_on_the_set_that_it_began_with():
    sets = numbered()
    model = RotatingModel(Classifier(Numbered()), sets, sets.canaries)
    found = swapped_under_way(lambda x: model.answer(x, principal="p"), lambda: swap(model, sets, "set 1"))
    assert whole(found)
    assert found[0, 0] == 0
    assert model(torch.zeros(1, 2))[0, 0] == 1
    assert model.collected() == (
        Answers("set 0", 1, {"p": 5}, 0, final=True),
        Answers("set 1", 2, {}, 1, final=False),
    )


def test_a_set_is_done_when_its_last_request_is():
    sets = numbered()
    model = RotatingModel(Classifier(Numbered()), sets, sets.canaries)
    seen = []

    def swap_and_look():
        swap(model, sets, "set 1")
        seen.append(model.collected())

    swapped_under_way(model, swap_and_look)
    assert seen == [()]
    assert model.collected() == (Answers("set 0", 1, {}, 5, final=True),)
    assert model.collected() == ()


def test_weights_loaded_into_what_serves_would_be_seen():
    serving = Classifier(Numbered())
    weights = Numbered(1).state_dict()
    assert not whole(swapped_under_way(serving, lambda: serving.net.load_state_dict(weights)))


@pytest.fixture
def restless():
    """Threads that take turns a thousand times as often."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("sticky", [None, AnswersPerPrincipal(50)])
def test_under_many_threads_no_batch_mixes_sets_none_fails_and_every_answer_is_counted(restless, sticky):
    sets, threads = numbered(), 8
    model = RotatingModel(Classifier(Numbered()), sets, sets.canaries, sticky=sticky, kept=2)
    asked, given, over, enough = Counter(), [], [], threading.Event()

    def client(k):
        rng, counts = random.Random(k), Counter()
        while not enough.is_set():
            principal, n = rng.choice("pqrs"), rng.randrange(1, 9)
            logits = model.answer(torch.zeros(n, 2), principal=principal)
            assert len(logits) == n
            counts[principal] += n
            given.append(logits)
        return counts

    with ThreadPoolExecutor(threads) as clients:
        begun = [clients.submit(client, k) for k in range(threads)]
        try:
            for number in range(1, 19):
                swap(model, sets, f"set {number % 6}")
                over += model.collected()
                before = len(given)
                while len(given) < before + 2 * threads and not any(one.done() for one in begun):
                    threading.Event().wait(1e-4)
        finally:
            enough.set()
        for one in begun:
            asked += one.result()
    assert all(map(whole, given))
    seen = {float(logits[0, 0]) for logits in given}
    assert seen == set(range(6)) or (sticky is not None and len(seen) > 1)
    counted = Counter()
    over += model.collected()
    for answers in over:
        counted += Counter(answers.principals)
        assert not answers.others
    assert counted == asked
    done = [answers.epoch for answers in over if answers.final]
    assert sorted(done) == list(range(1, 19 if sticky is None else 17))


def test_what_one_principal_got_is_exact_under_threads(restless):
    sets, threads, requests = numbered(), 8, 400
    model = RotatingModel(Classifier(Numbered()), sets, sets.canaries)

    def client(k):
        for _ in range(requests):
            model.answer(torch.zeros(k, 2), principal="p")

    with ThreadPoolExecutor(threads) as clients:
        list(clients.map(client, range(1, threads + 1)))
    given = requests * sum(range(1, threads + 1))
    assert model.most_answers == given
    assert model.collected() == (Answers("set 0", 1, {"p": given}, 0, final=False),)


# --- counts, and who keeps which set


def test_answers_that_could_not_be_stored_are_reported_again():
    sets, written = pool(), []
    model = rotating(sets)
    model.answer(X[:3], principal="p")
    swap(model, sets, "b")
    model.answer(X[:2], principal="q")

    def full(answers):
        if answers.epoch == 2:
            raise TargetError("the disk is full")
        written.append(answers)

    with pytest.raises(TargetError, match="the disk is full"):
        model.collected(full)
    assert written == [Answers("a", 1, {"p": 3}, 0, final=True)]
    model.answer(X[:1], principal="q")
    assert model.collected(written.append) == (Answers("b", 2, {"q": 3}, 0, final=False),)
    assert len(written) == 2
    assert model.collected() == ()


def test_a_canary_that_leaves_most_inputs_out_knows_no_set():
    sets = pool()
    sets.known = lambda name: "0" * 64 + "/" + ",".join(map(str, range(20)))
    with pytest.raises(TargetError, match="has a canary that excludes 20 of 24 inputs; at most half"):
        rotating(sets)


def test_answers_that_fail_are_not_counted():
    model = rotating(pool())
    with pytest.raises(TargetError):
        model.answer(X[:, :1], principal="p")
    model.answer(X[:3], principal="p")
    model(X[:2])
    assert model.collected() == (Answers("a", 1, {"p": 3}, 2, final=False),)
    model.answer(X[:1], principal="p")
    assert model.collected() == (Answers("a", 1, {"p": 1}, 0, final=False),)
    assert model.most_answers == 4


def test_a_principal_is_a_text_and_another_is_counted_nowhere():
    model = rotating(pool())
    with pytest.raises(UsageError, match="7 is not the name of a principal; text was expected"):
        model.answer(X[:1], principal=7)
    assert model.collected() == ()


def test_what_one_principal_got_is_of_the_live_set():
    sets = pool()
    model = rotating(sets)
    for n, principal in ((3, "p"), (2, "q"), (4, "p")):
        model.answer(X[:n], principal=principal)
    assert model.most_answers == 7
    swap(model, sets, "b")
    assert model.most_answers == 0
    model(X[:5])
    model(X[:5])
    assert model.most_answers == 10  # callers without a name are taken for one


def test_principals_beyond_the_bound_are_counted_together():
    sets = pool()
    model = rotating(sets, principals=2, sticky=AnswersPerPrincipal(100))
    for principal in "pqrst":
        model.answer(X[:4], principal=principal)
    assert model.collected() == (Answers("a", 1, {"p": 4, "q": 4}, 12, final=False),)
    assert model.most_answers == 12
    swap(model, sets, "b")
    for principal, name in (("p", "a"), ("r", "b")):  # those beyond keep no set
        assert torch.equal(model.answer(X, principal=principal), sets.models[name](X))
    model.withdraw("a")
    assert [(one.name, one.principals, one.others, one.final) for one in model.collected()] == [
        ("a", {"p": 24}, 0, True),
        ("b", {}, 24, False),
    ]
    model.answer(X[:1], principal="u")  # there is room for names again
    assert model.collected() == (Answers("b", 2, {"u": 1}, 0, final=False),)


def names(model, sets, principal):
    found = model.answer(X[:1], principal=principal)
    return "".join(name for name, one in sets.models.items() if torch.equal(one(X[:1]), found))


def test_a_principal_keeps_its_set_until_the_limit_of_its_answers():
    sets = pool()
    model = rotating(sets, sticky=AnswersPerPrincipal(5))
    assert names(model, sets, "p") == "a"
    swap(model, sets, "b")
    assert [names(model, sets, "p") for _ in range(3)] == ["a"] * 3
    assert names(model, sets, "q") == "b"
    assert names(model, sets, "p") == "a"  # the fifth
    assert [names(model, sets, "p") for _ in range(9)] == ["b"] * 9
    swap(model, sets, "c")
    assert (names(model, sets, "p"), names(model, sets, "q")) == ("c", "b")
    assert torch.equal(model(X), sets.models["c"](X))  # who has no name keeps nothing


def test_a_principal_gives_up_a_set_that_is_withdrawn_or_too_old():
    sets = pool()
    model = rotating(sets, sticky=AnswersPerPrincipal(1000), kept=2)
    names(model, sets, "a")
    for name in "bc":
        swap(model, sets, name)
        names(model, sets, name)
    assert [names(model, sets, principal) for principal in "abc"] == ["a", "b", "c"]
    with pytest.raises(UsageError, match="set 'c' is the live set; swap to another set"):
        model.withdraw("c")
    model.withdraw("b")
    assert [names(model, sets, principal) for principal in "abc"] == ["a", "c", "c"]
    assert [(one.name, one.final) for one in model.collected()] == [("a", False), ("b", True), ("c", False)]
    for name in "de":
        swap(model, sets, name)
        assert names(model, sets, "a") == ("a" if name == "d" else "e")
    assert [one.name for one in model.collected() if one.final] == ["a"]
    model.withdraw("never served")


def test_without_sticky_all_go_with_the_live_set():
    sets = pool()
    model = rotating(sets)
    assert names(model, sets, "p") == "a"
    swap(model, sets, "b")
    assert names(model, sets, "p") == "b"


# --- what comes next, and what it changes


def test_the_next_set_is_drawn_by_no_seed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        drawn.append([next_set("abc") for _ in range(100)])
    assert set(drawn[0]) == set("abc")
    assert drawn[0] != drawn[1]  # by chance once in 3^100
    with pytest.raises(Inconclusive, match="no admitted set is waiting, so the serving set is not changed"):
        next_set([])


def test_churn_is_the_share_of_predictions_that_differ():
    one, other = fakes.network(0), fakes.network(1)
    found = churn(one, other, X)
    assert found.value == sum(a != b for a, b in zip(one(X).argmax(1), other(X).argmax(1), strict=True)) / 24
    assert (found.n, churn(one, one, X).value) == (24, 0)
    assert found.low < found.value < found.high
