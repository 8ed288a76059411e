"""What a type checker tells users of the library."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = HERE / "typing"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("pyright") is None,
        reason="pyright is not installed: pip install 'jaxarith[test]'",
    ),
]


@pytest.fixture(scope="module")
def errors():
    """The numbers of the lines with errors, by file."""
    files = [SCRIPTS / "user_script.py", SCRIPTS / "mistakes.py"]
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    found = subprocess.run(
        [*command, "--outputjson", *map(str, files)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert found.returncode in (0, 1), found.stderr + found.stdout
    lines: dict[str, dict[int, str]] = {file.name: {} for file in files}
    for entry in json.loads(found.stdout)["generalDiagnostics"]:
        if entry["severity"] == "error":
            line = entry["range"]["start"]["line"] + 1
            lines[Path(entry["file"]).name][line] = entry["message"]
    return lines


def test_a_users_script_has_no_error(errors):
    assert errors["user_script.py"] == {}


def test_five_mistakes_are_found_and_nothing_else(errors):
    lines = (SCRIPTS / "mistakes.py").read_text().splitlines()
    wrong = [i for i, line in enumerate(lines, 1) if "# wrong: " in line]
    assert len(wrong) == 5
    assert sorted(errors["mistakes.py"]) == wrong, errors["mistakes.py"]
