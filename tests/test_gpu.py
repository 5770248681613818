"""What differs on a GPU: certificates, and workers that share one. Run with `pytest -m gpu tests/test_gpu.py`."""

import time
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast import L2, Batch, Linf, ThreatModel
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.provers import IBP, Crown, CrownIBP, GraphProver
from holdfast.core.errors import HoldfastError
from holdfast.io.data.data import open_data
from holdfast.io.models.models import open_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
    ),
]
N = 128
SEARCHING = (AlphaCrown(), BranchAndBound())
CASES = [
    *((prover, constraint) for prover in (IBP(), CrownIBP(), Crown()) for constraint in (Linf(0.1), L2(0.5))),
    *((prover, Linf(0.12)) for prover in SEARCHING),
]


def digits(n: int = N) -> Batch:
    """Bundled images of digits."""
    return open_data("mnist-mini", n=n).read(0, n)


@pytest.mark.parametrize(("prover", "constraint"), CASES, ids=lambda each: getattr(each, "name", str(each)))
def test_certificates_on_a_gpu_are_those_of_the_processor(prover: GraphProver, constraint: Linf | L2) -> None:
    """The bounds are equal up to rounding, and the same examples are certified, but for bounds close to zero."""
    network = open_model("mnist-cnn-hardened").model.eval().requires_grad_(False)
    batch, threat = digits(16 if prover in SEARCHING else N), ThreatModel(constraint)
    batch = batch.take(network(batch.x).argmax(1) == batch.y)
    expected = prover.ready(network, batch, threat)(batch)
    network, batch = network.cuda(), batch.to(torch.device("cuda"))
    ready = prover.ready(network, batch, threat)
    ready(batch)  # the first call chooses the algorithms of the libraries
    torch.cuda.synchronize()
    start = time.perf_counter()
    proofs = ready(batch)
    torch.cuda.synchronize()
    print(f"{prover.name} {constraint}: {1000 * (time.perf_counter() - start) / len(batch):.2f} ms an image")
    assert proofs.certified.device.type == "cuda"
    clear = expected.bound.abs() > 1e-2
    assert torch.equal(proofs.certified.cpu()[clear], expected.certified[clear])
    if prover not in SEARCHING:
        torch.testing.assert_close(proofs.bound.cpu(), expected.bound, atol=1e-2, rtol=1e-2)


def test_workers_of_a_ray_cluster_share_a_gpu(tmp_path: object) -> None:
    pytest.importorskip("ray", reason='Ray is not installed: pip install "holdfast-ml[scale]"')
    run = {"threat": "linf:0.1", "suite": "quick", "n": N, "device": "cuda", "doubts": False}
    local = holdfast.assess("mnist-cnn-hardened", "mnist-mini", workers=2, **run)
    half = holdfast.Ray(gpus_per_worker=0.5)
    cluster = holdfast.assess("mnist-cnn-hardened", "mnist-mini", workers=2, on=half, **run)
    for name, column in local.evidence.columns.items():
        assert torch.equal(column, cluster.evidence[name]), name
    with pytest.raises(HoldfastError, match="GPU"):
        holdfast.assess(
            "mnist-cnn-hardened",
            "mnist-mini",
            workers=2,
            on=holdfast.Ray(gpus_per_worker=4, timeout="5s"),
            **run,
        )


def test_the_verb_certifies_on_a_gpu() -> None:
    result = holdfast.certify("mnist-cnn-hardened", "mnist-mini", "linf:0.1", n=N, device="cuda")
    same = holdfast.certify("mnist-cnn-hardened", "mnist-mini", "linf:0.1", n=N, device="cpu")
    assert torch.equal(result.evidence["certified"], same.evidence["certified"])


def test_monitor_and_calibrate_on_a_gpu_find_what_the_processor_finds(tmp_path: Path) -> None:
    guard = "schema_version: 1\nmode: observe\ninputs: {shape: [1, 28, 28]}\noutputs: logit\nfalse_positives: 0.1\n"
    (tmp_path / "guard.yaml").write_text(f"{guard}rules:\n  energy: {{}}\n  squeezing: {{}}\n")
    pixels = digits(500)
    stream, reference = pixels.x[300:] * 0.7, (pixels.x[:300], pixels.y[:300])
    found = []
    for device in ("cpu", "cuda"):
        monitored = holdfast.monitor(stream, reference, "mnist-cnn", device=device)
        settings = {"guard": str(tmp_path / "guard.yaml"), "device": device}
        calibrated = holdfast.Calibrate(model="mnist-cnn", data="mnist-mini", **settings).run()
        found.append(([result.alarm for result in monitored.results], calibrated.calibration.thresholds))
    (alarms, thresholds), (alarms_on_gpu, thresholds_on_gpu) = found
    assert [alarm and alarm.after for alarm in alarms] == [alarm and alarm.after for alarm in alarms_on_gpu]
    assert thresholds_on_gpu == pytest.approx(thresholds, rel=1e-3)
