"""What the settings of all commands share: how they are checked, which function carries them out, and the table of
verbs. The module imports neither torch nor a module that carries out a command.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib import import_module
from inspect import signature
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar, cast

from pydantic import ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator

from holdfast.core.catalogue import AUDITS
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.names import did_you_mean, kind_of
from holdfast.settings import groups, values
from holdfast.settings.groups import SettingGroup
from holdfast.settings.texts import complaint, place
from holdfast.verbs import placement
from holdfast.verbs.placement import Ray

F = TypeVar("F", bound=Callable[..., Any])
G = TypeVar("G", bound=SettingGroup)
S = TypeVar("S", bound="Checked")


def carried_out_by(place: str) -> Callable[[F], F]:
    """Return a decorator for a method of settings that a function carries out, whose place is a module and a name, as
    in `holdfast.verbs.explain:explained`. The method itself has a signature and a docstring; a call with other
    arguments raises `TypeError`.

    The module imports torch, and these settings; it is imported when the method is called.
    """
    module, _, name = place.partition(":")

    def decorated(method: F) -> F:
        documented = signature(method)

        @wraps(method)
        def call(settings: Any, *arguments: Any, **options: Any) -> Any:
            given = documented.bind(settings, *arguments, **options)
            return getattr(import_module(module), name)(*given.args, **given.kwargs)

        return cast(F, call)

    return decorated


class Checked(SettingGroup):
    """Base class of settings whose construction raises `UsageError` that names the first invalid one."""

    verb: ClassVar[str] = ""
    """name of the command, or of the Python function, that has these settings"""

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, given: Any, filled: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        source: tuple[str, Mapping[str, str]] = info.context or (f"{cls.verb}(): ", {})
        prefix, written = source
        if not isinstance(given, Mapping):
            raise UsageError(f"{prefix}the settings are {kind_of(given)}; expected a mapping")
        content = cls._flat(given)
        for key in content:
            if key not in cls.model_fields:
                raise UsageError(f"{prefix}unknown key {key!r}{_of_other_verbs(str(key), cls)}")
        try:
            settings = filled(content)
        except ValidationError as error:
            key, dot, rest = place(error).partition(".")
            raise UsageError(f"{written.get(key, prefix + key)}{dot}{rest} {complaint(error)}") from None
        for kind in reversed(cls.__mro__):
            if "refuse_contradictions" in vars(kind):
                kind.refuse_contradictions(settings, prefix, written)  # type: ignore[attr-defined]
        return settings

    @classmethod
    def _flat(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return settings in which results of `open_model` and `open_data`, and a `Ray`, are replaced by the settings
        that they contain.
        """
        content = dict(given)
        for key, kind in (("model", ModelReference), ("data", DataReference)):
            reference = content.get(key)
            if isinstance(reference, kind) and cls is not kind:
                own = {name: getattr(reference, name) for name in reference.model_fields_set}
                cls._refuse_twice(own.keys() & content.keys() - {key}, kind.verb)
                if unused := [name for name in own if name not in cls.model_fields]:
                    raise UsageError(
                        f"{unused[0]}={own[unused[0]]!r} is not possible for the model of {cls.verb}",
                        Remedy(unused[0], function=kind.verb),
                    )
                content |= own
        if isinstance(on := content.get("on"), Ray) and issubclass(cls, placement.Placement):
            own = on.settings(cls.waiting_key)
            cls._refuse_twice(own.keys() & content.keys() - {"on"}, "Ray")
            content |= own
        return content

    @classmethod
    def _refuse_twice(cls, keys: set[str], other: str) -> None:
        """Raise `UsageError` for the first setting that is given both to this command and to another function."""
        if keys:
            raise UsageError(f"{min(keys)} is given to {cls.verb} and to {other}; give it once")

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Return the settings that were given, for the text of the object."""
        return ((key, getattr(self, key)) for key in type(self).model_fields if key in self.model_fields_set)


class ModelReference(
    groups.ServerLimits, groups.InferenceSource, groups.Members, groups.ModelSource, Checked
):
    """A model that is not opened yet, and options for opening it. The run opens it, so that the run counts all requests
    to a server.
    """

    verb = "open_model"


class DataReference(groups.DataSource, Checked):
    """Examples that are not read yet, and options for reading them. The run reads them, because some options depend on
    the model.
    """

    verb = "open_data"


class VerbSettings(groups.FileFormat, Checked):
    """Base class of the settings of one command, such as `assess`."""


class _Verbs(Mapping[str, type[VerbSettings]]):
    """The classes of the settings of verbs by name, each of which is imported when it is first used."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def __getitem__(self, verb: str) -> type[VerbSettings]:
        module, _, name = self._places[verb].partition(":")
        kind: type[VerbSettings] = getattr(import_module(module), name)
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


VERBS: Mapping[str, type[VerbSettings]] = _Verbs(
    {
        "assess": "holdfast.verbs.settings:Assess",
        "certify": "holdfast.verbs.settings:Certify",
        "harden": "holdfast.verbs.settings:Harden",
        "rotate": "holdfast.verbs.settings:RotateSettings",
        "serve": "holdfast.verbs.settings:Serve",
        "monitor": "holdfast.verbs.settings:Monitor",
        "adapt": "holdfast.verbs.settings:Adapt",
        **{
            f"audit-{audit.name}": f"holdfast.verbs.audit.{audit.name}:{audit.settings}"
            for audit in AUDITS.values()
            if audit.settings
        },
    }
)
"""Class of the settings of each verb, by name. A configuration file may contain a section for each of these verbs."""


def verbs_with(key: str) -> list[str]:
    """Return the verbs that have a setting."""
    return [verb for verb, kind in VERBS.items() if key in kind.model_fields]


def _of_other_verbs(key: str, kind: type[SettingGroup]) -> str:
    verbs = verbs_with(key)
    return f", which is a setting of {', '.join(verbs)}" if verbs else did_you_mean(key, kind.model_fields)


def check_settings(
    content: Mapping[str, Any],
    where: str,
    written: Mapping[str, str] = MappingProxyType({}),
    *,
    kind: type[S],
) -> S:
    """Return the settings of a command from text, such as a file or options. Raises `UsageError` that names the first
    invalid key and the most similar valid one.

    The message begins with `where`, the source of the content, except for keys in `written`, which maps keys to the
    form in which the user wrote them.
    """
    prefix, suite = f"{where}: " if where else "", content.get("suite")
    if "suite" in kind.model_fields and suite is not None and not values.is_suite(suite):
        raise UsageError(
            f"{prefix}suite is {suite!r}; expected a name, or names as in [pgd, square]; list attacks with settings "
            "under attacks:, as in [{use: PGD, steps: 100}]"
        )
    return kind.model_validate(dict(content), context=(prefix, written))


def group_of(settings: SettingGroup, kind: type[G]) -> G:
    """Return those settings of a command that belong to a group, or the defaults if the command does not have them."""
    if not isinstance(settings, kind):
        return kind.model_construct()
    return composed(kind, settings)


def composed(kind: type[G], *settings: SettingGroup) -> G:
    """Return an object with those settings of others that it has, and its defaults for the rest."""
    own = {key: value for each in settings for key, value in each if key in kind.model_fields}
    given = {key for each in settings for key in each.model_fields_set}
    return kind.model_construct(_fields_set=given & own.keys(), **own)
