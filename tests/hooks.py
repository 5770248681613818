"""Hooks of the modules of a network."""


def hooks_of(network):
    """All hooks that are registered with the modules of a network, of whatever kind."""
    kinds = [vars(module) for module in network.modules()]
    return [
        hook
        for kind in kinds
        for name, hooks in kind.items()
        if name.endswith("hooks")
        for hook in hooks.values()
    ]
