"""Settings of the place where shards run: this process, worker processes or a Ray cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from holdfast.core.errors import Remedy, UsageError
from holdfast.runs.engine.ray_cluster import RayOptions, refuse_address, refuse_missing_ray
from holdfast.settings import values
from holdfast.settings.grammar import seconds
from holdfast.settings.groups import Flag, Section, SettingGroup

ROTATING = "rotating:"
"""Beginning of the address of a pool of parameter sets."""
OF_CLUSTERS = ("ship", "gpus_per_worker", "mixed_nodes", "trust_network")


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

    def settings(self, waiting_key: str) -> dict[str, Any]:
        """Return the settings of a command by key. `waiting_key` is that of `timeout`."""
        return {
            "on": self.address,
            "ship": [str(path) for path in self.ship],
            "gpus_per_worker": self.gpus_per_worker,
            "mixed_nodes": self.mixed_nodes,
            "trust_network": self.trust_network,
            waiting_key: self.timeout,
        }


class Placement(SettingGroup):
    """Where the shards of a measurement run: on this machine, or on a Ray cluster. Groups of settings add the time to
    wait for the cluster.
    """

    section: ClassVar[Section] = "run"
    waiting_key: ClassVar[str] = ""
    """name of the setting with the maximum time to wait for the cluster"""

    on: Annotated[values.Place, Flag("PLACE", identifies=False)] = Field(
        default="local",
        description="Where shards run: local (the default), ray (a Ray cluster that is started on this machine), or "
        "ray://HOST:PORT. Ray needs --workers.",
    )
    ship: Annotated[list[str], Flag("PATH", completion="PATH", identifies=False)] = Field(
        default_factory=list,
        description="File or folder of code that is sent to the nodes, besides the file in file.py:factory.",
    )
    gpus_per_worker: Annotated[values.Amount | None, Flag("N", identifies=False)] = Field(
        default=None,
        description="GPUs of each worker, as in 1 or 0.5 (default: 1 if the run is on a GPU, else 0).",
    )
    mixed_nodes: Annotated[bool, Flag(identifies=False)] = Field(
        default=False,
        description="Allow nodes with other devices, threads or builds; the evidence then says so.",
    )
    trust_network: Annotated[bool, Flag(identifies=False)] = Field(
        default=False, description="Connect to an address in a network whose connections are not encrypted."
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a setting of a cluster without a cluster, and for an address that is not allowed."""
        if self.on != "local":
            address = "" if self.on == "ray" else self.on
            refuse_address(RayOptions(address, trust_network=self.trust_network))
            return
        for key in (*OF_CLUSTERS, self.waiting_key):
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise UsageError(
                    f"{written.get(key, prefix + key)} concerns a Ray cluster, and the run is local",
                    Remedy("on", "ray"),
                    Remedy(key),
                )

    def refuse_unusable_cluster(self: Any) -> None:
        """Raise `UsageError` for a cluster without a number of workers, without Ray, or for a pool of parameter
        sets.
        """
        if self.on == "local":
            return
        if isinstance(self.model, str) and self.model.startswith(ROTATING):
            raise UsageError(f"{self.model} runs on this machine only: {values.POOL_STAYS}", Remedy("on"))
        if self.workers is None:
            raise UsageError(
                f"on is {self.on}, which needs the number of shards that are measured at the same time",
                Remedy("workers", 4),
            )
        refuse_missing_ray(client=self.on != "ray")

    def ray_options(self, device: str) -> RayOptions | None:
        """Return the options of the cluster on which shards run, or None for this machine."""
        if self.on == "local":
            return None
        given = self.gpus_per_worker
        if given == 0 and device.startswith("cuda"):
            raise UsageError(
                f"gpus_per_worker is 0 and the device is {device}",
                Remedy("gpus_per_worker", 1, function="Ray"),
                Remedy("device", "cpu"),
            )
        return RayOptions(
            "" if self.on == "ray" else self.on,
            tuple(Path(path) for path in self.ship),
            (1.0 if device.startswith("cuda") else 0.0) if given is None else given,
            self.mixed_nodes,
            self.trust_network,
            seconds(getattr(self, self.waiting_key), self.waiting_key),
        )


_WAIT = "Maximum time to wait for CPUs of the cluster (default: 10min)."


class ClusterSettings(Placement):
    """Where the shards of an assessment run."""

    section: ClassVar[Section] = "run"
    timeout: Annotated[values.WaitingTime, Flag("T", identifies=False)] = Field(
        default="10min", description=_WAIT
    )
    waiting_key = "timeout"


class CertifyCluster(Placement):
    """Where the shards of a certification run. Its setting `timeout` limits the time of each example."""

    section: ClassVar[Section] = "run"
    cluster_timeout: Annotated[values.WaitingTime, Flag("T", identifies=False)] = Field(
        default="10min", description=_WAIT
    )
    waiting_key = "cluster_timeout"


class LocalOnly(SettingGroup):
    """Where the steps of a pool run: on this machine."""

    section: ClassVar[Section] = "run"
    on: Annotated[values.Here, Flag("PLACE", identifies=False)] = Field(
        default="local",
        description="Where the steps run: local. Ray is refused, because keys of a pool must not leave this machine.",
    )
