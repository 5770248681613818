"""The package as a whole: what it exports, what an import costs, what the wheel holds, how long its pieces are."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import chain
from pathlib import Path

import pytest

import holdfast
from holdfast.core.catalogue import ATTACKS
from holdfast.moved_modules import MOVED
from holdfast.runs.engine.identity import DECIDING, NOT_DECIDING
from holdfast.verbs.settings import audits

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "holdfast"
MODULES = sorted(SOURCE.rglob("*.py"))
NAMES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in MODULES
}
HOMES = holdfast._homes()
"""module of each exported name"""
ATTACK_MODULES = {entry.module for entry in ATTACKS.values()}
NETWORKS = ("mnist-cnn", "mnist-cnn-hardened")

# Functions that are one algorithm and read worse in pieces (docstrings do not count): "file:function" -> lines.
LONG_FUNCTIONS: dict[str, int] = {
    "verbs/attack.py:attack": 65,
    "verbs/opening/arguments.py:open_model": 62,
}
"""Functions that are one thing though they are long, and how long they may be."""


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def cpu_ms(*arguments):
    """CPU time of a new interpreter; the least of five, since other work only adds."""
    times = []
    for _ in range(5):
        before = os.times()
        python(*arguments)
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    return 1000 * min(times)


def test_a_small_assessment_imports_only_what_it_needs():
    code = (
        "import sys, holdfast\n"
        "holdfast.assess('mnist-cnn', 'mnist-mini', 'linf:0.1', 'pgd', n=4, doubts=False)\n"
        "print(sum(name.startswith('holdfast') for name in sys.modules))"
    )
    assert int(python("-c", code)) <= 264


# --- exports


def test_every_export_is_what_its_home_defines():
    for name in holdfast.__all__:
        value = getattr(holdfast, name)
        if name != "__version__":
            assert value.__module__ == HOMES[name], f"{name} is defined in {value.__module__}"


def test_exports_homes_and_the_imports_of_type_checkers_agree():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        a.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names
    }
    assert seen == HOMES
    assert seen.items() >= {kind.__name__: kind.__module__ for kind in audits().values()}.items()
    assert {*HOMES, "__version__"} == set(holdfast.__all__) == set(dir(holdfast))


def test_an_unknown_attribute_names_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'Linff'; it has .*Linf"):
        _ = holdfast.Linff


# --- costs


DOCUMENTED = {
    "api.rotate": "collect",
    "api.verb_settings": "Assess",
    "api.verbs.exhibition": "exhibition",
    "audits.generator.planting": "planted_diffusion",
    "audits.privacy.bounds": "epsilon_from_guesses",
    "certifiers.smoothing.smoothed": "Smoothed",
    "certifiers.texts.masking": "masked",
    "certifiers.trees.monotone": "monotone_in",
    "core.goal": "Goal",
    "generators.opening": "opened_generator",
    "guard.states.memory": "MemoryState",
    "io.models.mixtures": "fitted",
    "metrics.paired": "LOSSES",
    "recipes.training.loss_recipe": "LossRecipe",
    "rotation.pool.pool": "Pool",
    "testing.linear": "LinearOracle",
}
"""earlier module → a name that the documentation imported from it"""


def test_earlier_import_paths_work_in_a_new_process_and_name_the_present_path():
    statements = [f"from holdfast.{module} import {name}" for module, name in DOCUMENTED.items()]
    code = "\n".join(
        [
            "import warnings",
            "with warnings.catch_warnings(record=True) as caught:",
            "    warnings.simplefilter('always')",
            *(f"    {statement}" for statement in statements),
            "print(*(warning.message for warning in caught if 'holdfast' in str(warning.message)), sep='\\n')",
        ]
    )
    assert python("-c", code).splitlines() == [
        f"holdfast.{earlier} has moved: import {name} from holdfast.{MOVED[earlier]}"
        for earlier, name in DOCUMENTED.items()
    ]


def test_every_earlier_import_path_leads_to_a_module_that_exists():
    assert {f"holdfast.{present}" for present in MOVED.values()} <= NAMES.keys()


def test_import_costs_at_most_50_ms_of_cpu():
    assert cpu_ms("-c", "import holdfast") - cpu_ms("-c", "") <= 50


def test_help_costs_at_most_150_ms_of_cpu():
    assert cpu_ms("-m", "holdfast", "--help") <= 150


def test_import_brings_neither_torch_nor_numpy():
    loaded = python("-c", "import sys, holdfast; print(*sys.modules)").split()
    assert not {"click", "numpy", "pydantic", "rich", "scipy", "torch"} & set(loaded)


def test_help_brings_neither_torch_nor_numpy():
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); sys.argv[1:] = ['--help']"
    loaded = python("-c", f"{code}; from holdfast.cli import main; main()").split()
    assert "click" in loaded
    assert not {"numpy", "pydantic", "scipy", "torch"} & set(loaded)


def test_every_package_that_a_run_imports_is_part_of_its_code_digest_or_decides_no_number():
    code = "import sys, holdfast.runs.assess.assess, holdfast.runs.harden.harden, holdfast.rotation.steps.set_measuring"
    read = "(name for name, module in sys.modules.items() if getattr(module, '__file__', None))"
    names = [name.split(".") for name in python("-c", f"{code}; print(*{read})").split()]
    packages = {name[1] for name in names if name[0] == "holdfast" and len(name) > 2}
    covered = {name.partition("/")[0] for name in DECIDING}
    assert packages - covered == set(NOT_DECIDING)


# --- what is shipped


def test_one_version():
    assert version("holdfast-ml") == holdfast.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {holdfast.__version__}\n" in citation


def _pins() -> dict[str, tuple[str, list[str]]]:
    """Version and requiring distributions of each distribution in constraints.txt."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = re.fullmatch(r"([a-z0-9-]+)==([A-Za-z0-9.]+)( ; .*[^ ])? +# via (.+)", line)
            assert pin, line
            pins[pin[1]] = pin[2], pin[4].split(", ")
    return pins


def _normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def _required_by_the_project(extras=None) -> set[str]:
    """Distributions that the project requires, with some extras, or with all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    chosen = [optional[extra] for extra in (optional if extras is None else extras)]
    return {_normal(each) for each in chain(project["dependencies"], *chosen)}


def test_constraints_pin_every_dependency_exactly():
    pins = _pins()
    assert not _required_by_the_project() - set(pins)
    assert pins["torch"][0] == "2.13.0"


def test_constraints_contain_no_distribution_that_nothing_requires():
    pins, project = _pins(), _required_by_the_project()
    known = {"holdfast-ml", "the build"}
    for name, (_, parents) in pins.items():
        assert set(parents) <= {*pins, *known}, name
        assert ("holdfast-ml" in parents) == (name in project), name
        for parent in {*parents} - known:
            try:
                required = {_normal(each) for each in requires(parent) or ()}
            except PackageNotFoundError:
                continue  # an extra that the tests do not install
            assert name in required, f"{parent} does not require {name}"
    reached = set(known)
    while more := {name for name, (_, parents) in pins.items() if reached & {*parents}} - reached:
        reached |= more
    assert not set(pins) - reached


def test_every_file_that_ci_installs_has_a_known_hash():
    entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements-hashed.txt").read_text())[1:]
    assert len(entries) > 100
    pins, hashed = _pins(), {}
    for entry in entries:
        head, *hashes = entry.rstrip("\n").split(" \\\n    ")
        assert hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes), head
        name, version = head.split(" ;")[0].split("==")
        hashed.setdefault(name, set()).add(version.partition("+")[0])
    assert all(versions == {pins[name][0]} for name, versions in hashed.items())
    extras = re.search(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split(",")
    assert _required_by_the_project(extras) <= set(hashed)
    assert "make test HASHES=1" in (ROOT / ".ci/run").read_text()


def test_licences_stand_beside_what_they_cover():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    networks = [f"{network}.safetensors" for network in NETWORKS]
    for name in (*networks, "mnist-mini.npz", "ShareAlike 3.0", "LeCun"):
        assert name in notice
    assert metadata("holdfast-ml")["License-Expression"] == "Apache-2.0 AND CC-BY-SA-3.0"


@pytest.mark.slow
def test_the_wheel_holds_the_bundled_files_and_runs_the_demo_in_a_fresh_environment(tmp_path):
    options = ["-qq", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    python("-m", "pip", "wheel", *options, str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.split("/")[0].endswith(".dist-info")}
        assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in file.namelist()}
    tracked = subprocess.run(
        ["git", "ls-files", "src/holdfast"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert {name.removeprefix("src/") for name in tracked.stdout.split()} <= names
    assert {"holdfast/py.typed", "holdfast/bundled/mnist-mini.npz"} <= names
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)

    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    python("-m", "pip", "--python", str(fresh), "install", "-qq", "--no-deps", "--no-index", str(wheel))
    (site,) = (fresh / "lib").glob("python*/site-packages")
    # the dependencies are those of this environment; its editable Holdfast is not in that folder
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    offline = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [fresh / "bin" / "holdfast", "demo"],
        check=False,
        cwd=tmp_path,
        env=offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "holdfast-demo" / "report.html").is_file()


# --- sizes


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_an_attack_and_a_function_read_in_one_sitting(path):
    text = path.read_text(encoding="utf-8")
    if path.parent.name == "attacks" and path.stem in ATTACK_MODULES:
        assert text.count("\n") <= 180, f"{path.name} has {text.count(chr(10))} lines; at most 180"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            n_documented = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            n_lines = node.end_lineno - node.lineno + 1 - n_documented
            limit = LONG_FUNCTIONS.get(f"{path.relative_to(SOURCE)}:{node.name}", 60)
            assert n_lines <= limit, f"{node.name} has {n_lines} lines; at most {limit}"


def test_no_module_has_the_name_of_a_verb():
    verbs = (
        "assess harden certify rotate audit explain serve monitor adapt compare report verify init validate"
    )
    assert not {*verbs.split(), "doctor", "demo"} & {path.stem for path in SOURCE.glob("*.py")}


def imported_modules(path):
    """Modules of the package that a file imports, also inside functions, but not for type checkers alone."""
    found, waiting = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("holdfast"):
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                found |= {name if name in NAMES else node.module for name in names}
            if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
                waiting.append(node)
    return found


def test_no_modules_import_each_other():
    graph = {name: imported_modules(path) - {name} for name, path in NAMES.items()}
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the modules of a circle


def public(nodes):
    return [node for node in nodes if not node.name.startswith("_")]


def undocumented_fields(node):
    """Annotated names of a dataclass without a string below them and not named in the class docstring."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return []
    told = ast.get_docstring(node) or ""
    missing = []
    for line, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
            name, has_string = (
                line.target.id,
                isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant),
            )
            if not (has_string or name.startswith("_") or f"`{name}`" in told):
                missing.append(name)
    return missing


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_everything_public_is_documented(path):
    for node in public(
        n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)
    ):
        methods = public(part for part in node.body if isinstance(part, ast.FunctionDef))
        missing = [part.name for part in methods if not ast.get_docstring(part)]
        if path.parent.name == "attacks" and path.stem in ATTACK_MODULES:
            # Their fields are settings, and what is said of them is the help text.
            missing += undocumented_fields(node)
        assert not missing, f"{node.name}: nothing is said about {', '.join(missing)}"
