"""Every script starts in the same way, and a user's mistake is one line."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from PIL import Image

import experiments
from experiments.common import script

FOLDER = Path(experiments.__file__).parent
FILES = {
    file.relative_to(FOLDER).with_suffix("").as_posix(): ast.parse(file.read_text())
    for file in sorted(FOLDER.rglob("*.py"))
}


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def classes(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


SCRIPTS = {
    name: tree
    for name, tree in FILES.items()
    if "main" in functions(tree) and "Config" in classes(tree)
}
# It counts what XLA plans for machines that are not there, as they are by default.
AT_DEFAULT_PRECISION = {"bench/scaling"}


def test_there_are_scripts_in_all_folders():
    folders = {name.partition("/")[0] for name in SCRIPTS}
    assert folders >= {"tau_jp", "linear_layers", "bases", "awd", "editing", "bench"}
    assert len(SCRIPTS) > 50


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts_by_script_run_at_full_precision(name):
    tree = SCRIPTS[name]
    assert ast.unparse(tree.body[-1]) == (
        "if __name__ == '__main__':\n    script.run(Config, main)"
    )
    decorators = [ast.unparse(d) for d in functions(tree)["main"].decorator_list]
    expected = [] if name in AT_DEFAULT_PRECISION else ["script.full_precision"]
    assert decorators == expected
    assert ast.get_docstring(tree)


def test_no_module_but_the_scripts_runs_by_itself():
    by_itself = {
        name for name, tree in FILES.items() if "'__main__':" in ast.unparse(tree)
    }
    assert by_itself == set(SCRIPTS)


def test_no_script_of_a_paper_imports_a_script():
    modules = {f"experiments.{name.replace('/', '.')}": name for name in SCRIPTS}
    for name, tree in SCRIPTS.items():
        if name.startswith("bench/"):  # which measure the quickstart
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                found = {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
                assert not found & modules.keys(), name


def test_full_precision_holds_within_and_not_after():
    before = jax.config.jax_default_matmul_precision

    @script.full_precision
    def main(config):
        return config, jax.config.jax_default_matmul_precision

    with jax.default_matmul_precision("bfloat16"):
        assert main(3) == (3, "float32")
        assert jax.config.jax_default_matmul_precision == "bfloat16"
    assert jax.config.jax_default_matmul_precision == before


MISTAKES = {
    "a wrong option": (
        "tau_jp.table1_addition --batchsize 3",
        "Unrecognized options: --batchsize",
    ),
    "a wrong value": (
        "linear_layers.figure4_disentanglement --figure 5",
        "--figure",
    ),
    "a missing dataset": (
        "editing.table1_forgetting --data-dir {empty} --source folder",
        "no data of stanford_cars",
    ),
    "an unknown task": ("finetune --task cats --method linear", "--task cats"),
    "an unknown model": (
        "awd.figure2_single_models --models {empty} --tasks a={images} b={images}",
        "config.json",
    ),
    "a mesh that does not fit": (
        "bases.table2_mixing --tasks a={images} b={images} --mesh data=64",
        "64 devices",
    ),
    "an unknown bench model": ("bench.merge_ops --model vit", "--model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, tmp_path):
    (tmp_path / "empty").mkdir()
    for split in ("train", "validation", "test"):
        for label in ("one", "two"):
            (folder := tmp_path / "images" / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.png")
    before = sorted(tmp_path.rglob("*"))
    command, message = MISTAKES[name]
    places = {"empty": tmp_path / "empty", "images": tmp_path / "images"}
    module, *options = command.format(**places).split()
    out = tmp_path / "out"
    bank = [] if module.startswith("bench") else ["--bank", str(tmp_path / "bank")]
    result = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *options, "--out", str(out)]
        + bank,
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
        timeout=300,
    )
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith(f"experiments.{module}: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_is_named_by_its_extra_before_any_work():
    def run(first):
        code = f"import sys; sys.modules['tyro'] = None; {first}; import experiments"
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=FOLDER.parent,
        )

    result = run("sys.argv = ['-m']")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "tyro" in line and "jaxarith[demo]" in line
    assert "ImportError: missing: tyro" in run("pass").stderr


def test_the_readme_names_every_script_of_a_paper_and_no_other():
    text = (FOLDER / "README.md").read_text()
    named = set(re.findall(r"^\|[^|]*\| `(\w+)", text, re.MULTILINE))
    papers = ("tau_jp", "curvature", "linear_layers", "bases", "awd", "editing")
    scripts = {name.split("/")[1] for name in SCRIPTS if name.startswith(papers)}
    assert named == scripts
