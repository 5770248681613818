"""Seeds are derived by named draws: no code computes with a seed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.core.draws import Draws
from holdfast.io.models.generators import open_generator

SOURCE = Path(holdfast.__file__).parent
SEEDING = ("manual_seed", "default_rng", "Draws")
EXCEPTIONS = {
    "doubts/gallery/decisions.py: 1 + i": "numbers of the networks of a gallery, whose weights decide recorded numbers",
    "control/environments.py: seed % 2 ** 31": "the seed of an episode as gymnasium accepts it",
}
"""places that compute with a seed, with the reasons"""


def is_seed(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        name = str(node.slice.value)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "int" and node.args:
        return is_seed(node.args[0])
    return name.lower() in ("seed", "seeds") or name.lower().endswith("_seed")


def computed_seeds(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        operands: list[ast.expr] = []
        if isinstance(node, ast.BinOp):
            operands = [node.left, node.right]
        elif isinstance(node, ast.AugAssign):
            operands = [node.target, node.value]
        if any(map(is_seed, operands)):
            yield ast.unparse(node)
        if isinstance(node, ast.Call):
            seeds = [word.value for word in node.keywords if word.arg and word.arg.endswith("seed")]
            if ast.unparse(node.func).split(".")[-1] in SEEDING:
                seeds += node.args
            # a shift of the key of a draw only shortens it
            yield from (
                ast.unparse(seed)
                for seed in seeds
                if isinstance(seed, ast.BinOp) and not isinstance(seed.op, ast.RShift | ast.BitOr)
                if not any(map(is_seed, (seed.left, seed.right)))
            )


def test_no_seed_is_computed_from_another_by_arithmetic():
    found = {
        f"{path.relative_to(SOURCE).as_posix()}: {code}"
        for path in SOURCE.rglob("*.py")
        for code in computed_seeds(path.read_text(encoding="utf-8"))
    }
    assert found == {*EXCEPTIONS}


@pytest.mark.parametrize(
    "code",
    ["seed + k", "how.design.seed * 100_000 + k", "seed += 1", "f(int(m['seed']) - 1)", "manual_seed(7 + k)"],
)
def test_arithmetic_on_a_seed_is_found(code):
    assert [*computed_seeds(code)]


class Normal:
    def sample(self, n, seed):
        return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_samples_of_other_seeds_do_not_repeat():
    generator = open_generator(Normal())
    sets = [{tuple(row) for row in generator.samples(2000, seed).tolist()} for seed in (0, 1, 2)]
    assert len(set.union(*sets)) == 6000
    assert torch.equal(generator.samples(2000, 1), generator.samples(2000, 1))


def test_the_seed_of_draws_fits_the_generators_of_all_libraries():
    seeds = [Draws(seed).at("piece", piece).seed for seed in range(40) for piece in range(25)]
    assert len({*seeds}) == 1000
    assert min(seeds) >= 0 and 2**30 < max(seeds) < 2**31
