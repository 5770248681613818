"""What a server and its workers need to start: the settings of the user, and what the verb has opened for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.guard.decisions import RequestGuard
from holdfast.monitoring.accuracy import Reference
from holdfast.server.audit_chain import AuditKey
from holdfast.server.flagged_inputs import FlaggedInputs
from holdfast.server.generation import LoadedModel, no_rules
from holdfast.server.live_pool import LivePool
from holdfast.server.protocol_v2 import Signature
from holdfast.server.requests import HostNames
from holdfast.settings.serve_settings import ProxySettings, RequestLimits, ServeOptions, is_public

HUNG_S = 30.0
"""least number of seconds without progress after which a worker is replaced"""


class ServerSettings(RequestLimits, ProxySettings, ServeOptions):
    """The settings of `holdfast serve` that a running server reads. Those of its model are only used to open it."""


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to start. It is pickled, and its functions open the model and the guard in the worker."""

    opening: Callable[[], LoadedModel]
    """function that opens the model; for a pool, the architecture with any parameters"""
    name: str
    """name of the model in URLs"""
    shape: tuple[int, ...]
    """shape of one input"""
    settings: ServerSettings = field(default_factory=ServerSettings)
    set_name: str = ""
    """name under which the parameters of the model are recorded; empty for a pool, which sends its sets"""
    digest: str = ""
    """digest of the model that was opened before the workers start, which that of each worker must equal"""
    device: str = "cpu"
    threads: int | None = None
    hung_s: float = HUNG_S
    """seconds without progress after which a worker is replaced; longer for a slow model, see `Worker.patience_s`"""
    guard: Callable[[str | None], RequestGuard] = no_rules
    """function that opens the guard, given the digest of the model that its calibration must name"""
    audit_key: AuditKey | None = field(default=None, repr=False)
    signature: Signature | None = None
    """signature of a proxied model, which is known at the start; None for a model that is called to find it"""
    monitor: Reference | None = None
    """what samples of the requests are compared with; None without a monitor"""

    @property
    def rotating(self) -> bool:
        """Whether the parameter sets are those of a pool."""
        return not self.set_name

    @property
    def keys(self) -> Path | None:
        """File of the keys; None without keys."""
        return None if self.settings.keys is None else Path(self.settings.keys)

    @property
    def hosts(self) -> HostNames:
        """Host names under which requests are answered: all, if other machines reach the server and none are given."""
        settings = self.settings
        return _host_names(settings, everything=is_public(settings.host) and not settings.accepted_hosts)

    @property
    def admin_hosts(self) -> HostNames:
        """Host names under which the requests of the operator are answered."""
        return _host_names(self.settings, everything=False)


def _host_names(settings: ServerSettings, *, everything: bool) -> HostNames:
    names = (*settings.accepted_hosts, settings.host, settings.admin_host)
    return HostNames(frozenset(name.lower().removesuffix(".") for name in names), everything)


@dataclass(frozen=True)
class ServerSetup:
    """What a server needs besides its workers: the pool, the monitor, and what it states about the model."""

    worker: WorkerSetup
    pool: LivePool | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """facts about the model and the settings for the first record of the audit chain"""
    reloadable: bool = False
    """whether the model is in a file, which may be opened again while the server runs"""
    opening: Mapping[str, Any] = field(default_factory=dict)
    """settings with which a model in a file is opened, or the folder of the pool, for `holdfast adapt`; empty for
    another model
    """
    renewed: Callable[[], Reference] | None = None
    """function that returns the reference of the monitor with the model that is in the file now; None if it does not
    depend on it
    """
    candidate: Callable[[str], WorkerSetup] | None = None
    """function from the path of a file to the setup of a worker that serves the model in it; None without a file"""
    notes: tuple[str, ...] = ()
    """what the operator should know about the guard"""
    flagged: FlaggedInputs | None = None
    """the inputs that the guard stores; None if it stores none"""

    @property
    def settings(self) -> ServerSettings:
        """The settings of the user."""
        return self.worker.settings
