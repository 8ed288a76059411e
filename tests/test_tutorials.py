"""The tutorials run, draw what they say, and are notebooks in percent format.

Here they run with a CLIP of one layer; their texts tell what the whole one does.
"""

import ast
import re
import runpy
from pathlib import Path

import pytest

import experiments

FOLDER = Path(experiments.__file__).parent / "tutorials"
FILES = {file.stem: file for file in sorted(FOLDER.glob("[a-z]*_*.py"))}
# What each prints, and the pictures that it draws into runs/tutorials.
PRINTS = {
    "merge_own_code": (r"Equinox: sum at 0\.6 +0\.\d+", []),
    "sum_without_interference": (r"cyclic τJp +mean ξ 0\.\d+", ["interference"]),
    "statistics_instead_of_data": (r"sum at 0: 0\.\d+", ["rescaling"]),
    "cost_of_a_tangent": (r"linearised step +\d\.\d+e", ["tangents"]),
    "merge_folders": (r"with_sum is .*lora_sum", ["folders/gradients"]),
}


def cells(name):
    """The kind and the text of every cell."""
    parts = re.split(r"^# %%(.*)\n", FILES[name].read_text(), flags=re.MULTILINE)
    assert parts[0] == ""
    return list(zip(map(str.strip, parts[1::2]), parts[2::2], strict=True))


def test_every_tutorial_is_in_the_readme_and_here():
    named = re.findall(r"\[`(\w+)\.py`\]\(\1\.py\)", (FOLDER / "README.md").read_text())
    assert sorted(named) == sorted(PRINTS) == sorted(FILES)


@pytest.mark.parametrize("name", PRINTS)
def test_a_tutorial_is_text_and_code_in_cells(name):
    kinds = [kind for kind, _ in cells(name)]
    assert kinds[0] == kinds[-1] == "[markdown]" and set(kinds) == {"[markdown]", ""}
    for kind, text in cells(name):
        if kind:
            assert all(line[:1] in ("#", "") for line in text.splitlines())
        else:
            ast.parse(text)  # a cell runs by itself
    assert "# ## Where to go next" in cells(name)[-1][1]
    assert 60 <= len(FILES[name].read_text().splitlines()) <= 120


@pytest.mark.parametrize("name", PRINTS)
def test_a_tutorial_runs_and_draws(name, tmp_path, monkeypatch, capsys, shallow_clip):
    if name == "merge_own_code":
        pytest.importorskip("equinox", reason="equinox is not installed")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FILES[name]))
    said, pictures = PRINTS[name]
    assert re.search(said, capsys.readouterr().out)
    folder = tmp_path / "runs" / "tutorials"
    found = {str(file.relative_to(folder)) for file in folder.rglob("*.png")}
    assert found == {f"{picture}.png" for picture in pictures}
