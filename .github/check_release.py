"""Builds the wheel and the sdist, and tries the wheel where nothing else is installed.

    python .github/check_release.py [--dist FOLDER] [--tag v0.2.0]

It needs git, pip and a package index, and takes a few minutes: two virtual
environments are made. It checks that

- the wheel holds every file of `jaxarith/` that git knows but for `docs/`, and no
  other;
- the wheel that is built from the sdist holds the same bytes;
- both say what the index shows of them (`twine check --strict`);
- the installed wheel imports every public module, but for those that ask for an extra;
- `jaxarith` prints its help and its version, and merges two models.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What the wheel must have besides code, in case git does not have it either.
EXPECTED = (
    "jaxarith/py.typed",
    "jaxarith/CHANGELOG.md",
    "jaxarith/assets/tiny_clip/config.json",
    "jaxarith/assets/tiny_clip/model.safetensors",
    "jaxarith/data/vision_tasks.json",
)

# Packages of extras that modules import at once.
EXTRAS = ("PIL", "matplotlib")

# Imports every public module; prints those that need what is not installed.
IMPORTS = """
import importlib, pkgutil
import jaxarith

for found in pkgutil.walk_packages(jaxarith.__path__, "jaxarith."):
    if found.name == "jaxarith.__main__":
        continue
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        print(found.name, error.name)
"""

# Two models of one tensor and the mean of both.
MODELS = """
import json, pathlib, sys
import numpy as np
from safetensors.numpy import load_file, save_file

if sys.argv[1] == "make":
    for name, value in (("one", 1), ("two", 3)):
        folder = pathlib.Path(name)
        folder.mkdir()
        save_file({"w": np.full(4, value, np.float32)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "any"}))
else:
    merged = load_file("merged/model.safetensors")
    assert merged.keys() == {"w"}, merged
    np.testing.assert_array_equal(merged["w"], np.full(4, 2, np.float32))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, help="folder for the wheel and the sdist")
    parser.add_argument("--tag", help="the tag of the release, such as v0.2.0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        wheel, sdist = build(scratch)
        version = wheel.name.split("-")[1]
        if args.tag is not None and args.tag != f"v{version}":
            sys.exit(f"the tag is {args.tag}, and what was built is version {version}.")
        check_contents(wheel)
        try_installed(wheel, version, scratch)
        if args.dist is not None:
            args.dist.mkdir(parents=True, exist_ok=True)
            for file in (wheel, sdist):
                shutil.copy(file, args.dist)
    print(f"jaxarith {version}: the wheel and the sdist are fine")


def build(scratch: Path) -> tuple[Path, Path]:
    """The wheel and the sdist, of which the first is built from the second."""
    tools = environment(scratch / "tools")
    run(tools, "-m", "pip", "install", "-q", "build", "twine")
    run(tools, "-m", "build", "--outdir", str(scratch / "dist"), str(ROOT))
    direct = ("--wheel", "--outdir", str(scratch / "direct"), str(ROOT))
    run(tools, "-m", "build", *direct)
    (wheel,) = (scratch / "dist").glob("*.whl")
    (sdist,) = (scratch / "dist").glob("*.tar.gz")
    (other,) = (scratch / "direct").glob("*.whl")
    if other.name != wheel.name or contents(other) != contents(wheel):
        sys.exit(f"{wheel.name} of the sdist differs from {other.name} of the sources.")
    run(tools, "-m", "twine", "check", "--strict", str(wheel), str(sdist))
    return wheel, sdist


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def check_contents(wheel: Path) -> None:
    """Raises SystemExit if files are missing from the wheel, or too many."""
    found = {name for name in contents(wheel) if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "jaxarith"], cwd=ROOT, capture_output=True, check=True
    )
    tracked = listed.stdout.decode().splitlines()
    code = {name for name in tracked if not name.startswith("jaxarith/docs/")}
    expected = {*code, *EXPECTED}
    for names, told in ((expected - found, "lacks"), (found - expected, "also has")):
        if names:
            sys.exit(f"the wheel {told} {', '.join(sorted(names))}.")
    print(f"{wheel.name}: {len(found)} files, {wheel.stat().st_size:,} bytes")


def try_installed(wheel: Path, version: str, scratch: Path) -> None:
    """Raises SystemExit if the wheel does not work where nothing else is installed."""
    bare = environment(scratch / "bare")
    run(bare, "-m", "pip", "install", "-q", str(wheel))
    unimported = run(bare, "-c", IMPORTS, cwd=scratch).splitlines()
    if strange := [x for x in unimported if x.split()[1] not in EXTRAS]:
        sys.exit("modules that do not import:\n" + "\n".join(strange))
    print("modules that need an extra: " + "; ".join(unimported))
    command = str(bare.with_name("jaxarith"))
    assert "usage: jaxarith" in called(command, "--help", cwd=scratch)
    said = called(command, "--version", cwd=scratch).strip()
    if said != version:
        sys.exit(f"jaxarith --version says {said}; the wheel is {version}.")
    run(bare, "-c", MODELS, "make", cwd=scratch)
    models = ("--model", "one", "--model", "two")
    called(
        *(command, "merge", "--method", "average", *models, "--out", "merged"),
        cwd=scratch,
    )
    run(bare, "-c", MODELS, "check", cwd=scratch)


def environment(folder: Path) -> Path:
    """The interpreter of a new virtual environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str, cwd: Path = ROOT) -> str:
    return called(str(python), *arguments, cwd=cwd)


def called(*command: str, cwd: Path) -> str:
    """What a program prints; its errors go to the terminal."""
    print("+", *(word if "\n" not in word else "..." for word in command), flush=True)
    # Nothing of the sources, or of the caller's environment, is imported.
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environ, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{done.stdout.decode()}\nended with status {done.returncode}.")
    return done.stdout.decode()


if __name__ == "__main__":
    main()
