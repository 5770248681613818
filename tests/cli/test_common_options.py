"""Commands that read a model or data have the same common options, with the exceptions that are listed here."""

import click
import pytest

from holdfast.cli.app import verbs
from holdfast.cli.setting_options import flag_names
from holdfast.settings import groups

COMMON = {
    "the model": groups.ModelSource,
    "members of a model": groups.Members,
    "a model that is only evaluated": groups.InferenceSource,
    "the limit of queries": groups.QueryLimit,
    "inputs": groups.InputSpace,
    "data": groups.DataSource,
    "the selection of examples": groups.ExampleSelection,
    "the seed": groups.Seed,
    "the device": groups.Device,
    "stored examples": groups.StoredExamples,
}
"""Groups of settings whose options every command has that reads a model or data."""

TRAINED = "a network is trained, so that it is one network whose weights are in a file"
GRADIENTS = "its gradient is computed, so that it is one network whose weights are in a file"
SERVED = "the server was started with these options, and states them"
NO_DATA = "it reads no data"
POOL = "the manifest of the pool states how its model and data are opened"
NONE_STORED = "it stores and shows no examples"
LISTS = "it reads one data set without a model, and lists or changes all of its examples"
TEMPLATE = "it writes a configuration file, to which other settings are added by hand"

STEPS_OF_POOL = ("rotate train", "rotate draw", "rotate admit")
TRAINING = ("harden", "rotate collect", "rotate run", "audit backdoor", "audit poison", "audit privacy")
OF_DATA = ("data show", "data poison")

EXCEPTIONS = {
    "the model": {
        "adapt": SERVED,
        "init": TEMPLATE,
        **dict.fromkeys(STEPS_OF_POOL, POOL),
        **dict.fromkeys(OF_DATA, LISTS),
    },
    "members of a model": {
        "adapt": SERVED,
        "init": TEMPLATE,
        "audit generator": "a generator has no members",
        "audit membership": "reference networks are trained like the model, which is one network",
        "audit extraction": "copies are trained like the model, which is one network",
        "audit reconstruct": GRADIENTS,
        **dict.fromkeys(TRAINING, TRAINED),
        **dict.fromkeys(STEPS_OF_POOL, POOL),
        **dict.fromkeys(OF_DATA, LISTS),
    },
    "a model that is only evaluated": {
        "adapt": SERVED,
        "init": TEMPLATE,
        "serve": "--proxy is for a model behind a server, with options of its own",
        "audit generator": "a generator is a function in Python",
        "audit reconstruct": GRADIENTS,
        **dict.fromkeys(TRAINING, TRAINED),
        **dict.fromkeys(STEPS_OF_POOL, POOL),
        **dict.fromkeys(OF_DATA, LISTS),
    },
    "the limit of queries": {
        "adapt": SERVED,
        "init": TEMPLATE,
        "serve": "the clients of the server have budgets of their own",
        "audit generator": "a generator is a function in Python",
        "audit reconstruct": GRADIENTS,
        **dict.fromkeys(TRAINING, TRAINED),
        **dict.fromkeys(STEPS_OF_POOL, POOL),
        **dict.fromkeys(OF_DATA, LISTS),
    },
    "inputs": {
        "adapt": SERVED,
        "init": TEMPLATE,
        **dict.fromkeys(STEPS_OF_POOL, POOL),
        **dict.fromkeys(OF_DATA, LISTS),
    },
    "data": {
        "serve": NO_DATA,
        "init": TEMPLATE,
        "data show": "it shows all arrays and splits that a file has",
        "data poison": "it reads the train and the test split of an archive of images",
        **dict.fromkeys(STEPS_OF_POOL, POOL),
    },
    "the selection of examples": {
        "serve": NO_DATA,
        "init": TEMPLATE,
        "rotate collect": "sets are trained on the whole train split, and n_judged is the number of judged examples",
        "rotate run": "sets are trained on the whole train split, and n_judged is the number of judged examples",
        **dict.fromkeys(STEPS_OF_POOL, POOL),
        **dict.fromkeys(OF_DATA, LISTS),
    },
    "the seed": {
        "serve": "the answers of a model have no seed",
        "init": TEMPLATE,
        "data show": LISTS,
        **dict.fromkeys(STEPS_OF_POOL, POOL),
    },
    "the device": {
        "doctor": "it calls the model with few inputs, on the CPU",
        "init": TEMPLATE,
        **dict.fromkeys(OF_DATA, LISTS),
    },
    "stored examples": {
        **dict.fromkeys(("serve", "doctor", "calibrate", "monitor"), NONE_STORED),
        "init": TEMPLATE,
        **dict.fromkeys(("rotate collect", "rotate run", *STEPS_OF_POOL), NONE_STORED),
        **dict.fromkeys(OF_DATA, LISTS),
    },
}
"""For each group, the commands that lack some of its options, with the reason."""


def commands(command: click.Command, words: tuple[str, ...] = ()) -> dict[str, click.Command]:
    """All commands by their words."""
    if not isinstance(command, click.Group):
        return {" ".join(words): command}
    context = click.Context(command)
    inner = {name: command.get_command(context, name) for name in command.list_commands(context)}
    return {key: leaf for name, each in inner.items() for key, leaf in commands(each, (*words, name)).items()}


COMMANDS = commands(verbs)
OPTIONS = {
    name: {
        option
        for each in command.params
        if isinstance(each, click.Option)
        for option in (*each.opts, *each.secondary_opts)
    }
    for name, command in COMMANDS.items()
}
OF_GROUPS = {name: set(flag_names(group).values()) for name, group in COMMON.items()}
KEPT_RUNS = {
    "ui": "it opens the model of a stored run to explain it, as the run states it",
}
"""Commands that read no model and no data themselves, although they share an option with those that do."""
READING = {
    name
    for name, options in OPTIONS.items()
    if name not in KEPT_RUNS and any(options & of_group for of_group in OF_GROUPS.values())
}


def test_the_commands_that_read_a_model_or_data_are_known():
    arguments = {
        name
        for name, command in COMMANDS.items()
        for each in command.params
        if isinstance(each, click.Argument) and each.name in ("model", "data", "address", "server", "pool")
    }
    of_ledger = {f"rotate {step}" for step in ("swap", "status", "head", "expose")}
    assert arguments - of_ledger - READING == set()


@pytest.mark.parametrize("group", COMMON)
def test_every_command_that_reads_a_model_or_data_has_the_common_options_or_a_reason(group):
    lacking = {name: OF_GROUPS[group] - OPTIONS[name] for name in sorted(READING)}
    unexplained = {
        name: sorted(options)
        for name, options in lacking.items()
        if options and name not in EXCEPTIONS[group]
    }
    assert not unexplained
    assert not [name for name in EXCEPTIONS[group] if not lacking.get(name)], "exceptions that are none"
