"""Opens environments and policies: bundled names, ids of gymnasium, functions in files, archives of stable-baselines3,
networks of ONNX, and policies that `holdfast harden` wrote.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from holdfast.control.environments import BUNDLED, LQR, CartPole, Discrete, Environment, Gymnasium, registered
from holdfast.control.policies import Network, Policy, policy_of
from holdfast.core.errors import TRUST_CODE, Remedy, TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.io.data.npz import Npz
from holdfast.io.files import content_of_file, refusing
from holdfast.io.models.adapting import digest_of_object
from holdfast.io.models.factories import build_function, names_code
from holdfast.io.models.models import open_model
from holdfast.io.models.weights import read_weights, written

POLICY = "policy.safetensors"
"""file with the weights of a hardened policy"""


@dataclass(frozen=True)
class Opened:
    """An environment or a policy, with its name and the digest of its files."""

    value: Any
    name: str
    digest: str
    notes: tuple[str, ...] = ()


def open_environment(source: object) -> Opened:
    """Return the environment of a bundled name, an id of gymnasium, `file.py:make` or a function that creates one.

    Raises `UsageError` for an unknown name, and `TargetError` for an object of another interface.
    """
    if isinstance(source, str) and not names_code(source):
        if source in BUNDLED:
            return Opened(BUNDLED[source](), source, hashlib.sha256(source.encode()).hexdigest())
        environment = registered(source)
        import gymnasium  # `registered` has refused it if it is missing

        named = f"{source} {gymnasium.__version__}"
        return Opened(environment, source, hashlib.sha256(named.encode()).hexdigest())
    if isinstance(source, str):
        function, digest = build_function(source, {})
        return Opened(_made(function, source), source, digest)
    if not callable(source):
        raise UsageError(
            f"the environment is {type(source).__name__}; a name, file.py:make, or a function that creates an "
            "environment was expected"
        )
    return Opened(_made(source, "environment"), "environment", digest_of_object(source))


def _made(make: Callable[[], Any], name: str) -> Environment:
    first = make()
    return first if isinstance(first, CartPole | LQR) else Gymnasium(make, name)


def open_policy(
    source: object,
    environment: Environment,
    arguments: Mapping[str, str],
    *,
    trust_code: bool,
    arch: str | None = None,
) -> Opened:
    """Return the policy of `file.py:make`, an archive of stable-baselines3 (.zip), a network of ONNX, a folder of
    `holdfast harden`, or a module or function.

    Raises `UsageError` or `TargetError` if it does not fit the environment.
    """
    notes: tuple[str, ...] = ()
    if arch is not None and (not isinstance(source, str) or names_code(source) or source.endswith(".zip")):
        raise UsageError(
            f"arch is {arch!r}, which builds the network for a file of weights, and the policy is no such file",
            Remedy("arch"),
        )
    if not isinstance(source, str):
        name, digest, made = "policy", digest_of_object(source), source  # type: ignore[arg-type]  # digested as it is
    elif names_code(source):
        function, digest = build_function(source, arguments)
        name, made = source, function()
    elif (Path(source) / POLICY).is_file() or Path(source).name == POLICY:
        path = Path(source) / POLICY if Path(source).is_dir() else Path(source)
        name, (made, digest) = source, _own(path)
    elif source.endswith(".zip"):
        name, (made, digest, notes) = source, _archived(Path(source), environment, arguments)
    elif source.endswith((".pt", ".pth")) and not trust_code and arch is None:
        raise UsageError(
            f"{source!r} may contain a pickled policy, whose code would run; give file.py:make, an archive of "
            "stable-baselines3 (.zip), or with arch the function that builds the network of these weights",
            TRUST_CODE,
        )
    else:
        opened = open_model(source, arch=arch, model_args=dict(arguments), trust_code=trust_code)
        name, digest, made, notes = source, opened.digest, _Unread(opened.model), opened.notes
    policy = policy_of(made, environment, name)
    return Opened(policy, name, digest, (*notes, *_moved(policy, environment)))


_STARTS = 64
"""number of beginnings of episodes in which the actions of a policy are compared with the bounds of actions"""


def _moved(policy: Policy, environment: Environment) -> list[str]:
    """A note on actions that are vectors outside of the bounds of the environment."""
    if isinstance(policy.actions, Discrete):
        return []
    with torch.no_grad():
        outputs = policy.outputs(environment.reset(torch.arange(_STARTS)), policy.begin(_STARTS))
    outside = int((outputs != policy.act(outputs)).any(1).sum())
    if not outside:
        return []
    note = (
        f"{outside} of {_STARTS} actions at the beginning of episodes were outside of the bounds of the actions of "
        f"{environment.name}; such actions are moved to the bounds"
    )
    return [note]


def saved(policy: Policy) -> bytes:
    """Return the file of a hardened policy."""
    network = policy.function
    assert isinstance(network, Network)
    first, last = network.body[0], network.body[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return written(network, {"policy": [first.in_features, last.out_features, first.out_features]})


def _own(path: Path) -> tuple[nn.Module, str]:
    content = content_of_file(path, "policy")
    damage = (KeyError, RuntimeError, ValueError, safetensors.SafetensorError)
    with refusing(f"{str(path)!r} is no policy of holdfast harden", damage):
        tensors = safetensors.torch.load(content)
        width, d = tensors["body.0.weight"].shape
        network = Network(d, len(tensors["body.4.bias"]), width)
        network.load_state_dict(tensors)
    return network, hashlib.sha256(content).hexdigest()


class _Unread(nn.Module):
    """The outputs of a network as they are, because a classifier reads a single output as a probability or a logit."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.net, self.batches = model.net, model.batches

    def forward(self, x: Tensor) -> Any:
        """Return scores or actions."""
        return self.net(x) if self.batches is None else self.batches.through(self.net, x)


_ACTIVATIONS: Mapping[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}
_MOST_BYTES = 1 << 28
"""largest size of the weights of an archive"""
_OF_TRAINING = ("value_net.", "mlp_extractor.value_net.", "q_net_target.q_net.", "log_std")
"""beginnings of the names of weights that only the training uses"""


class _Baseline(nn.Module):
    """A policy of stable-baselines3: normalised observations, hidden layers and the layer of the actions."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], activation: type[nn.Module]) -> None:
        super().__init__()
        d = layers[0][0].shape[1]
        self.mean, self.scale = nn.Buffer(torch.zeros(d)), nn.Buffer(torch.ones(d))
        self.clip = float("inf")
        parts: list[nn.Module] = []
        for weight, bias in layers:
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
            parts += [linear, activation()]
        self.body = nn.Sequential(*parts[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return scores or actions."""
        out: Tensor = self.body(((x - self.mean) * self.scale).clamp(-self.clip, self.clip))
        return out


def _archived(
    path: Path, environment: Environment, arguments: Mapping[str, str]
) -> tuple[nn.Module, str, tuple[str, ...]]:
    """The policy in an archive of stable-baselines3, of which only the weights are read: nothing in it is unpickled."""
    for name in arguments:
        if name not in ("activation", "normalise"):
            raise UsageError(
                f"{str(path)!r} has no argument {name!r}; its arguments are activation and normalise (an .npz file "
                "with mean and var of VecNormalize)"
            )
    content = content_of_file(path, "archive")
    damage = (zipfile.BadZipFile, KeyError, OSError, NotImplementedError)
    with (
        refusing(f"{str(path)!r} is no archive of stable-baselines3 with policy.pth", damage),
        zipfile.ZipFile(io.BytesIO(content)) as archive,
    ):
        size = archive.getinfo("policy.pth").file_size
        if size > _MOST_BYTES:
            raise TargetError(
                f"the weights in {str(path)!r} have {size:,} bytes; at most {_MOST_BYTES:,} are read"
            )
        weights = read_weights(path, archive.read("policy.pth")).tensors
    of_dqn = any(key.startswith("q_net.q_net.") for key in weights)
    prefix, head = ("q_net.q_net.", "") if of_dqn else ("mlp_extractor.policy_net.", "action_net")
    used = [key for key in weights if not key.startswith(_OF_TRAINING)]
    foreign = [key for key in used if not key.startswith((prefix, "action_net."))]
    places = sorted(
        {key.removeprefix(prefix).split(".")[0] for key in used if key.startswith(prefix)}, key=int
    )
    names = [f"{prefix}{place}" for place in places] + ([head] if head else [])
    layers = [
        (weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in names if f"{name}.weight" in weights
    ]
    if foreign or not layers or any(weight.dim() != 2 for weight, _ in layers):
        raise TargetError(
            f"{str(path)!r} has no policy of linear layers alone (MlpPolicy) of PPO, A2C or DQN, because its weights "
            f"include {', '.join(sorted(foreign or weights)[:3])}; give file.py:make, which returns the network, for "
            "policies of images (CnnPolicy), with memory, or of other algorithms"
        )
    usual = "relu" if of_dqn else "tanh"
    chosen = arguments.get("activation", usual)
    if chosen not in _ACTIVATIONS:
        raise UsageError(f"activation is {chosen!r}; expected {', '.join(_ACTIVATIONS)}")
    network = _Baseline(layers, _ACTIVATIONS[chosen])
    notes = [
        f"the archive pickles its activation, which is not read: {chosen} was used"
        + ("" if "activation" in arguments else f", the default of {'DQN' if of_dqn else 'PPO and A2C'}")
    ]
    if "normalise" in arguments:
        _normalise(network, Path(arguments["normalise"]))
    return network, hashlib.sha256(content).hexdigest(), tuple(notes)


def _normalise(network: _Baseline, path: Path) -> None:
    archive = Npz(path, "statistics")
    with refusing(f"{str(path)!r} is no .npz file with mean and var", (ValueError, TypeError)):
        mean, var = (
            torch.from_numpy(archive.array(name).astype(np.float32)).flatten() for name in ("mean", "var")
        )
        # the default is that of VecNormalize
        network.clip = float(archive.array("clip")) if "clip" in archive.names else 10.0
    if mean.shape != network.mean.shape:
        raise TargetError(
            f"{str(path)!r} has the statistics of {len(mean)} values, and the policy reads {len(network.mean)}"
        )
    network.mean.copy_(mean)
    network.scale.copy_((var + 1e-8).rsqrt())
