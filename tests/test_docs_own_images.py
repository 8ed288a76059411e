"""The guide's way from three image folders to a merged model, with fewer steps."""

import re
import shlex
from pathlib import Path

import clip_checkpoint
import pytest
import tyro

from experiments import digit_folders
from experiments.common.vision import fitted
from experiments.tau_jp import table1_addition
from jaxarith.models import clip

GUIDE = Path(clip.__file__).parents[1] / "docs" / "own_images.md"
SCRIPTS = {
    "experiments.digit_folders": digit_folders,
    "experiments.tau_jp.table1_addition": table1_addition,
}
FEWER = ["--steps", "2", "--samples", "16", "--batch-size", "8", "--bank", "bank"]
FEWER += ["--mesh", "data=1", "--evaluation-batch", "16"]


def guide() -> str:
    return GUIDE.read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words after `python -m` of every command of the section."""
    found = re.findall(r"```bash\n(.*?)```", guide(), re.DOTALL)
    return [shlex.split(text.replace("\\\n", " "))[2:] for text in found]


def test_the_commands_are_those_of_two_scripts():
    assert [words[0] for words in commands()] == list(SCRIPTS)
    assert "--save-merged" in commands()[1]


def test_three_folders_become_a_model_that_transformers_loads(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "jaxarith" / "assets").mkdir(parents=True)
    clip_checkpoint.shallow(tmp_path / "jaxarith" / "assets" / "tiny_clip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitted, "ADAMERGING_STEPS", 2)
    for name, *words in commands():
        fewer = FEWER if name.endswith("table1_addition") else []
        script = SCRIPTS[name]
        script.main(tyro.cli(script.Config, args=words + fewer))
    [example] = re.findall(r"```python\n(.*?)```", guide(), re.DOTALL)
    scope = {}
    exec(compile(example, "own_images.md", "exec"), scope)
    ours = clip.load("runs/own/merged")
    projection = scope["model"].visual_projection.weight.detach().numpy()
    assert (projection.T == ours.params["visual_projection"]["kernel"]).all()
    assert scope["processor"].tokenizer.model_max_length > 0
