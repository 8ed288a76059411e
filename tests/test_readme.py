"""The README's example runs as it stands."""

import re
from pathlib import Path

import numpy as np

from jaxarith.models import clip

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs_and_saves_a_model_that_loads(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["features"].shape == (1, 64)
    assert np.isfinite(scope["features"]).all()
    saved = clip.load("merged").params["visual_projection"]["kernel"]
    np.testing.assert_array_equal(saved, scope["params"]["visual_projection"]["kernel"])


def test_there_are_exactly_two_commands_that_set_everything_up():
    assert (
        len(re.findall(r"^python3 -m venv .*", README.read_text(), re.MULTILINE)) == 2
    )
