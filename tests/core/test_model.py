"""The classifier: preprocessing, what a network may return, and the errors that name what it did instead."""

import pytest
import torch
from torch import nn

from holdfast.attacks import PGD
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Batches, Bounds, Classifier, Model, fitted, out_of_memory
from holdfast.core.threat import ThreatModel
from holdfast.runs.harness.measure import measure

X = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def test_preprocessing_is_channel_by_channel():
    model = Classifier(nn.Flatten(), mean=(0.5, 0.25), std=(0.5, 2.0))
    expected = torch.stack(((X[:, 0] - 0.5) / 0.5, (X[:, 1] - 0.25) / 2.0), dim=1).flatten(1)
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(Classifier(nn.Flatten(), mean=(0.5,))(X), (X - 0.5).flatten(1))


def test_a_rotation_is_a_model_that_needs_no_ids():
    model = Classifier(nn.Flatten())
    assert isinstance(model, Model)
    assert torch.equal(model(X, torch.tensor([5, 6, 7])), model(X))


def test_one_logit_becomes_two_classes():
    for single in (
        Classifier(lambda x: x.flatten(1).sum(1)),
        Classifier(lambda x: x.flatten(1).sum(1, keepdim=True)),
    ):
        logits = single(X)
        assert logits.shape == (3, 2)
        assert torch.equal(logits[:, 0], torch.zeros(3))
        torch.testing.assert_close(logits[:, 1], X.flatten(1).sum(1))


@pytest.mark.parametrize(
    "value, says",
    [
        (lambda x: (x, x), "returned a tuple; it must return one tensor of logits"),
        (lambda x: x, r"returned torch.float32 of shape \(3, 2, 4, 4\) for 3 inputs; .* \(3, classes\)"),
        (lambda x: x.flatten(1)[:2], r"of shape \(2, 32\) for 3 inputs"),
        (lambda x: x.flatten(1).long(), "returned torch.int64"),
        (lambda x: x.flatten(1).argmax(1), r"returned torch.int64 of shape \(3,\)"),
        (lambda x: x.view(7, -1), "raised RuntimeError on inputs of shape .* Check the shape"),
    ],
)
def test_what_is_no_logits_is_named(value, says):
    with pytest.raises(TargetError, match=says):
        Classifier(value)(X)


@pytest.mark.parametrize("batches", [Batches(2), Batches(2, multiples=True), Batches(8)])
def test_what_is_no_logits_is_named_in_batches_too(batches):
    with pytest.raises(TargetError, match="returned a tuple; it must return one tensor of logits"):
        Classifier(lambda x: (x, x), batches=batches)(X)
    with pytest.raises(TargetError, match=r"returned torch.float32 of shape \(\) for 3 inputs"):
        Classifier(torch.sum, batches=batches)(X)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 10, 12, 25, 50, 100, 200, 256])
@pytest.mark.parametrize("multiples", [False, True])
def test_the_batches_that_a_network_takes_are_found_out(size, multiples):
    def picky(x):
        assert len(x) % size == 0 if multiples else len(x) == size
        return x.flatten(1)

    model = Classifier(picky)
    with fitted(model, X):
        found = model.batches
        torch.testing.assert_close(model(X), X.flatten(1))
    assert found == (None if multiples and size == 1 else Batches(size, multiples))
    assert model.batches is None


def test_wrong_numbers_are_named():
    with pytest.raises(TargetError, match="returned 32 classes, but 10 were declared; .*give classes=32 to "):
        Classifier(nn.Flatten(), classes=10)(X)
    with pytest.raises(TargetError, match="mean or std has 3 entries, but the inputs have 2 channels"):
        Classifier(nn.Flatten(), mean=(0.1, 0.2, 0.3))(X)
    with pytest.raises(TargetError, match=r"std is \[0.5, 0.0\]; every entry must be positive"):
        Classifier(nn.Flatten(), std=(0.5, 0.0))


NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes. Error code 12",
    "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    "std::bad_alloc",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 31.75 GiB total capacity)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 8.00 MB, max allowed: 9.07 GB)",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
)


@pytest.mark.parametrize("error", [MemoryError(), *map(RuntimeError, NO_MEMORY)], ids=lambda e: str(e)[:50])
def test_an_error_of_missing_memory_is_not_converted(error):
    def greedy(x):
        raise error

    assert out_of_memory(error)
    with pytest.raises(type(error)):
        Classifier(greedy)(X)


def test_other_errors_are_not_about_memory():
    for said in ("shape", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_NOT_INITIALIZED"):
        assert not out_of_memory(RuntimeError(said))
    assert not out_of_memory(ValueError("can't allocate memory"))


def test_bounds_by_numbers_and_by_features():
    assert Bounds(-1.0, 3.0).width == 4
    assert Bounds(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 7.0])).width == 7
    assert Bounds(torch.tensor([0.0, 2.0]), 3.0).clamp(torch.tensor([[-1.0, 9.0]])).tolist() == [[0.0, 3.0]]
    low, high = Bounds().like(torch.zeros(2, dtype=torch.float64))
    assert (low.dtype, high.dtype) == (torch.float64, torch.float64)


def test_a_threat_model_refuses_what_cannot_be_meant():
    for eps in (-0.1, float("nan")):
        with pytest.raises(UsageError, match=f"eps is {eps}; it must be 0"):
            ThreatModel(Linf(eps))
    with pytest.raises(UsageError, match="queries is 0; it must be at least 1"):
        ThreatModel(queries=0)
    assert ThreatModel(Linf(0.0)).constraint.eps == 0


def test_access_includes_what_comes_before():
    threat = ThreatModel(access="scores")
    assert [threat.gives(a) for a in ("none", "labels", "scores", "gradients")] == [True, True, True, False]


@pytest.mark.parametrize(("limit", "remedies"), [(4, ("batch_size",)), (9, ())])
def test_an_error_for_some_inputs_is_not_attributed_to_the_size_of_the_batch(limit, remedies):
    def net(x):
        if len(x) > limit or x.max() > 0.9:
            raise ValueError("refused")
        return x

    model, x = Classifier(net), torch.full((8, 2), 0.5)
    model(x[:2])
    x[5] = 0.5 if remedies else 1.0
    with pytest.raises(TargetError, match="raised ValueError") as caught:
        model(x)
    assert tuple(remedy.argument for remedy in caught.value.remedies) == remedies


def test_a_batch_keeps_ids_and_targets():
    batch = Batch(X, torch.tensor([0, 1, 2]), torch.tensor([9, 7, 8]), torch.tensor([1, 2, 0]))
    some = batch.take(torch.tensor([True, False, True]))
    assert (some.ids.tolist(), some.y.tolist(), some.target.tolist(), len(some)) == (
        [9, 8],
        [0, 2],
        [1, 0],
        2,
    )
    assert [part.ids.tolist() for part in batch.split(2)] == [[9, 7], [8]]
    assert batch.at(X + 1).ids is batch.ids and batch.at(X + 1).target is batch.target
    assert batch.towards(None).target is None
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.x, X) and torch.equal(moved.target, batch.target)


def test_a_model_that_changes_its_input_is_given_a_copy():
    def net(x):
        with torch.no_grad():
            x.clamp_(0.2, 0.8)
        return x.flatten(1)

    model, x = Classifier(net), X.clone()
    with fitted(model, X):
        found = model(x)
        assert torch.equal(x, X)
        leaf = X.clone().requires_grad_()
        assert torch.autograd.grad(model(leaf).sum(), leaf)[0].abs().sum() > 0
    torch.testing.assert_close(found, X.clamp(0.2, 0.8).flatten(1))
    for writes in (lambda x: x.data.mul_(0.5), lambda x: x.numpy().__imul__(0.5)):

        def unseen(x, writes=writes):
            writes(x)
            return x.flatten(1)

        model, x = Classifier(unseen), X.clone()
        with fitted(model, X):
            model(x)
        assert torch.equal(x, X)
    first = Classifier(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()))
    with fitted(first, X):
        leaf = X.clone().requires_grad_()
        assert torch.autograd.grad(first(leaf).sum(), leaf)[0].abs().sum() > 0


@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_have_the_type_of_the_inputs(inside):
    model = Classifier(lambda x: x.flatten(1).to(inside))
    assert model(X).dtype == X.dtype
    batch = Batch(X, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert len(measure(model, [batch], [PGD(steps=3, restarts=2)], ThreatModel(Linf(0.1)))["success"]) == 3


def test_a_detector_is_refused_with_a_function_that_returns_scores():
    def net(images):
        labels, scores = torch.tensor([3, 3, 5]), torch.tensor([0.2, 0.7, 0.4])
        return [{"labels": labels, "scores": scores * image.mean()} for image in images]

    with pytest.raises(TargetError, match="largest score of each class over the boxes") as caught:
        Classifier(net)(torch.rand(2, 3, 4, 4))
    names = {"net": net}
    exec("\n".join(caught.value.code), names)
    x = torch.rand(2, 3, 4, 4)
    scores = Classifier(names["scores"])(x)
    assert scores.shape == (2, 91)
    torch.testing.assert_close(scores[:, 3], 0.7 * x.mean((1, 2, 3)))
