"""The tests of all doubts, their probes, and the selection of the probes and of the examples on which each is run."""

import torch

from holdfast.attacks.parts.sampling import sample_rows
from holdfast.attacks.protocol import Attack
from holdfast.core.catalogue import DOUBTS, load, names
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask, Rows
from holdfast.doubts.protocol import DoubtTest, Probe, probing_threat, within_budget


def doubt_tests() -> dict[str, DoubtTest]:
    """Return the tests of all doubts by name, in the order of reports, with those of other packages in the entry-point
    group `holdfast.doubts`.
    """
    return {name: load("doubts", name, DoubtTest) for name in names("doubts")}


def doubt_test(name: str) -> DoubtTest:
    """Return the test of a doubt. If no installed package has it, as for a stored run, it consists of its name."""
    known = name in DOUBTS or name in names("doubts")
    return load("doubts", name, DoubtTest) if known else DoubtTest(name.replace("-", " ").capitalize())


def all_probes() -> tuple[Probe, ...]:
    """Return all probes in their order, except the new run of the suite."""
    probes = {probe.name: probe for test in doubt_tests().values() for probe in test.probes}
    return tuple(sorted(probes.values(), key=lambda probe: probe.order))


def probes_for(threat: ThreatModel, attacks: tuple[Attack, ...] = ()) -> tuple[Probe, ...]:
    """Return the probes that are possible under a threat model, with those that run the attacks of the suite again. If
    eps is 0, these are only the ones that do not change inputs.
    """
    of_suite = [test.of_suite for test in doubt_tests().values() if test.of_suite is not None and attacks]
    probes = (*all_probes(), *(probe(attacks) for probe in of_suite))
    return tuple(probe for probe in probes if probe.applies(threat) and threat.gives(probe.needs))


def counts(probe: Probe, threat: ThreatModel) -> bool:
    """Return whether adversarial examples that a probe finds are inside the threat model, including its limit on
    queries.
    """
    return probe.breaks and within_budget(probe.queries, threat) == probe.queries


def surviving_examples(columns: Columns, threat: ThreatModel) -> Mask:
    """Return the mask of the examples that survive all attacks of the suite.

    For a minimum-norm run, these are the examples that were not broken within 1.05 times the eps of the probes. The
    factor allows for inaccurate distances: a probe that breaks an example just inside its known distance is no evidence
    against the run.
    """
    surviving = columns["correct"] & columns.get("eligible", torch.ones_like(columns["correct"]))
    if threat.constraint.eps < torch.inf:
        return surviving & ~columns["success"]
    return surviving & (columns["distance"] > 1.05 * probing_threat(threat, columns).constraint.eps)


def rows_for(
    probe: Probe, columns: Columns, threat: ThreatModel, rng: Draws, most: int | None = None
) -> Rows:
    """Return the row indices of the examples on which a probe is run, at most `most`, in the order of the data.

    A sample depends on ids only, so that shards have no influence.
    """
    n = probe.most if most is None else min(most, probe.most)
    if probe.on == "correct":
        among = columns["correct"] & columns.get("eligible", torch.ones_like(columns["correct"]))
        return sample_rows(columns, among, rng, n)
    surviving = surviving_examples(columns, threat)
    if probe.on == "surviving":
        return sample_rows(columns, surviving, rng, n)
    # a margin in probability is at least -1, so that examples with NaN are among the first
    closeness = columns.get("attacked_probability_margin", columns["margin"]).double().nan_to_num(nan=-1.0)
    rows = surviving.nonzero()[:, 0]
    return rows[closeness[rows].argsort(stable=True)[:n]].sort().values
