"""Who may import whom: the floors of the library, read from the sources.

Imports inside functions count as well: they decide what a program can load.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports from its own floor and those above it in this list, never below.
FLOORS = [
    ["typing", "files", "resources"],
    ["lazy"],
    ["tree"],
    ["batches", "tangent", "task_vectors", "losses", "metrics", "precision", "report"],
    ["fingerprint", "sharding", "tau_jp"],
    ["merge", "models", "hub", "data", "plots"],
    ["curvature"],
    ["train", "evaluate", "stream"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
FLOOR = {f"jaxarith.{room}": i for i, rooms in enumerate(FLOORS) for room in rooms}

# Packages that only some modules of the library import. A prefix stands for a package.
ONLY_IN = {
    "flax": [
        "jaxarith.models",
        "jaxarith.merge.capture",
        "jaxarith.curvature.layers",
        # Flax's own file format: they import `flax.serialization` alone.
        "jaxarith.hub",
        "jaxarith.commands.convert",
    ],
    "grain": ["jaxarith.data"],
    "tensorflow_datasets": ["jaxarith.data"],
    "datasets": ["jaxarith.data"],
    "orbax": ["jaxarith.train.checkpoint"],
    "tensorboardX": ["jaxarith.train.observers"],
    "matplotlib": ["jaxarith.plots"],
    # Where they are installed, they tell the names of a model's class.
    "transformers": [
        "jaxarith.data",
        "jaxarith.models",
        "jaxarith.commands.adapters.classes",
    ],
    "torch": ["jaxarith.hub.pickles", "jaxarith.commands.adapters.classes"],
    "tyro": [],
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(file): file
    for package in ("jaxarith", "experiments")
    for file in sorted((ROOT / package).rglob("*.py"))
    if "docs" not in file.relative_to(ROOT).parts  # of the site, no package
}
SOURCES = {module: ast.parse(file.read_text()) for module, file in FILES.items()}


def imports(module: str) -> set[str]:
    """The modules that one imports, in whichever of its lines, and their packages."""
    found = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return found


IMPORTS = {module: imports(module) for module in FILES}
LIBRARY = [module for module in FILES if module.split(".")[0] == "jaxarith"]
EXPERIMENTS = [module for module in FILES if module.split(".")[0] == "experiments"]


def room(module: str) -> str:
    """`jaxarith.tree` of `jaxarith.tree._paths`."""
    return ".".join(module.split(".")[:2])


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def assert_no_circle(arrows: dict[str, set[str]]):
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_no_module_imports_itself_through_others():
    # What `__init__` re-exports is loaded before the modules beside it, so a module
    # must not ask its own package for them.
    assert_no_circle({m: found & FILES.keys() for m, found in IMPORTS.items()})


def test_no_package_imports_itself_through_others():
    arrows: dict[str, set[str]] = {}
    for module in LIBRARY:
        arrows.setdefault(room(module), set()).update(
            room(other) for other in IMPORTS[module] if other in LIBRARY
        )
    for source, targets in arrows.items():
        targets.discard(source)
    arrows.pop("jaxarith")  # it re-exports its modules
    assert_no_circle(arrows)


def test_every_part_of_the_library_has_a_floor():
    rooms = {room(module) for module in LIBRARY} - {"jaxarith"}
    assert rooms == FLOOR.keys()


def test_the_library_imports_from_its_own_floor_and_those_below():
    upward = [
        f"{module} imports {other}"
        for module in LIBRARY
        if module != "jaxarith"
        for other in IMPORTS[module]
        if room(other) in FLOOR and FLOOR[room(module)] < FLOOR[room(other)]
    ]
    assert not upward


def test_merge_knows_no_models():
    known = [m for m in LIBRARY if is_in(m, "jaxarith.merge")]
    assert not [
        m for m in known if any(is_in(o, "jaxarith.models") for o in IMPORTS[m])
    ]


@pytest.mark.parametrize("package", ONLY_IN)
def test_only_some_modules_import(package):
    allowed = ONLY_IN[package]
    importing = [
        module
        for module in LIBRARY
        if any(is_in(other, package) for other in IMPORTS[module])
    ]
    assert not [m for m in importing if not any(is_in(m, a) for a in allowed)]


def test_files_of_flax_need_no_more_of_it_than_their_format():
    for module in LIBRARY:
        if not is_in(module, "jaxarith.hub") and not is_in(module, "jaxarith.commands"):
            continue
        for node in ast.walk(SOURCES[module]):
            if isinstance(node, ast.ImportFrom) and is_in(str(node.module), "flax"):
                assert [alias.name for alias in node.names] == ["serialization"]


def test_nothing_in_the_library_imports_an_experiment():
    assert not [m for m in LIBRARY if any(is_in(o, "experiments") for o in IMPORTS[m])]


def is_script(module: str) -> bool:
    """Whether a module of `experiments` is a program: it has `main` or `__main__`."""
    for node in SOURCES[module].body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return True
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            return True
    return False


def test_no_script_is_imported():
    found = {
        module
        for module in EXPERIMENTS
        if any(other in EXPERIMENTS and is_script(other) for other in IMPORTS[module])
    }
    assert not found


def test_what_the_experiments_share_knows_no_paper():
    common = [m for m in EXPERIMENTS if is_in(m, "experiments.common")]
    assert not [m for m in common if is_script(m)]
    assert not [
        f"{module} imports {other}"
        for module in common
        for other in IMPORTS[module]
        if is_in(other, "experiments") and not is_in(other, "experiments.common")
    ]


def test_mergekits_definitions_come_with_merge():
    assert "jaxarith.merge.mergekit" in IMPORTS["jaxarith.merge"]


# What `import jaxarith` must not load: it takes seconds, and may not be installed.
HEAVY = {
    *("flax", "transformers", "matplotlib", "torch", "tensorflow"),
    *("optax", "orbax", "grain", "datasets", "tensorflow_datasets"),
}


@pytest.mark.parametrize("statement", ["import jaxarith", "from jaxarith import merge"])
def test_importing_the_library_loads_nothing_heavy(statement):
    loaded = subprocess.run(
        [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    packages = {module.split(".")[0] for module in loaded.split()}
    assert {"jaxarith", "jax", "numpy"} <= packages
    assert not packages & HEAVY
