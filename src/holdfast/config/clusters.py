"""The cluster on which shards run: from settings or from an argument in Python to the options of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.config.grammar import seconds
from holdfast.config.settings import Assess, Certify, Harden
from holdfast.config.values import POOL_STAYS
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.engine.ray_cluster import RayOptions, refuse_missing_ray

ROTATING = "rotating:"
"""Beginning of the address of a pool of parameter sets."""


@dataclass(frozen=True)
class Ray:
    """A Ray cluster for the argument `on` of `holdfast.assess` and `holdfast.harden`.

    holdfast.assess(net, data, on=holdfast.Ray("ray://head:10001", trust_network=True), workers=64)
    """

    address: str = "ray"
    """`ray` for a cluster that is started on this machine, or `ray://HOST:PORT`"""
    ship: Sequence[str | Path] = ()
    """files and folders of code that are sent to the nodes"""
    gpus_per_worker: float | None = None
    """number of GPUs of each worker, which may be a fraction; None for one if the run is on a GPU, else for none"""
    mixed_nodes: bool = False
    """whether nodes may have other devices, threads or builds"""
    trust_network: bool = False
    """whether an address is used whose connections are not encrypted"""
    timeout: str = "10min"
    """maximum time to wait for CPUs of the cluster"""


def cluster_settings(on: str | Ray) -> dict[str, Any]:
    """Return the settings of the argument `on` by key."""
    if not isinstance(on, Ray):
        return {"on": on}
    return {
        "on": on.address,
        "ship": [str(path) for path in on.ship],
        "gpus_per_worker": on.gpus_per_worker,
        "mixed_nodes": on.mixed_nodes,
        "trust_network": on.trust_network,
        "timeout": on.timeout,
    }


def refuse_unusable_cluster(settings: Assess | Certify | Harden, address: str | None) -> None:
    """Raise `UsageError` for a cluster without a number of workers, without Ray, or for a pool of parameter sets.

    `address` is that of the model, or None for an object.
    """
    on = settings.on
    if on == "local":
        return
    if address is not None and address.startswith(ROTATING):
        raise UsageError(f"{address} runs on this machine only: {POOL_STAYS}", Remedy("on"))
    if settings.workers is None:
        raise UsageError(
            f"on is {on}, which needs the number of shards that are measured at the same time",
            Remedy("workers", 4),
        )
    refuse_missing_ray(client=on != "ray")


def ray_options(settings: Assess | Certify | Harden, device: str) -> RayOptions | None:
    """Return the options of the cluster on which shards run, or None for this machine."""
    refuse_unusable_cluster(settings, settings.model)
    if settings.on == "local":
        return None
    given = settings.gpus_per_worker
    if given == 0 and device.startswith("cuda"):
        raise UsageError(
            f"gpus_per_worker is 0 and the device is {device}",
            Remedy("gpus_per_worker", 1, function="Ray"),
            Remedy("device", "cpu"),
        )
    return RayOptions(
        "" if settings.on == "ray" else settings.on,
        tuple(Path(path) for path in settings.ship),
        (1.0 if device.startswith("cuda") else 0.0) if given is None else given,
        settings.mixed_nodes,
        settings.trust_network,
        seconds(getattr(settings, settings.waiting_key), settings.waiting_key),
    )
