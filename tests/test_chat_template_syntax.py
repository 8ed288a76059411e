"""Chat templates of a YAML file that are no Jinja are refused before a merge."""

import json
import re

import merge_command
import pytest
from merge_command import fails, write

from jaxarith import cli
from jaxarith.commands.merge import template_syntax
from jaxarith.commands.merge.chat_templates import NAMED

models = merge_command.models  # a fixture

GOOD = "{% for m in messages %}\n{{ m['content'] }}{% endfor %}"
BROKEN = {
    "an open loop": ("{% for m in messages %}{{ m.content }}", "line 1: .*endfor"),
    "an open expression": ("{{ bos_token }}\n{{ messages[0]", "line 2: unexpected end"),
    "an unknown filter": ("{{ messages[0].content | trimm }}", "line 1: .*trimm"),
    "an unknown statement": ("{{ bos_token }}{% fore m in messages %}", "'fore'"),
}


def config(folder, models, template):
    named = "".join(f"- model: {model}\n" for model in models)
    text = f"merge_method: average\nmodels:\n{named}"
    return write(folder / "c.yaml", f"{text}chat_template: {json.dumps(template)}\n")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_template_is_refused_with_both_lines(models, tmp_path, capsys, case):
    pytest.importorskip("jinja2")
    template, told = BROKEN[case]
    path = config(tmp_path, models, template)
    error = fails(capsys, path, tmp_path / "out")
    assert f"{path}, line 6: chat_template is not valid Jinja:" in error
    assert re.search(told, error)
    assert not (tmp_path / "out").exists()
    assert cli.main(["recipe", "check", path]) == 1


def test_what_transformers_adds_to_jinja_is_no_error():
    pytest.importorskip("jinja2")
    for template in (*NAMED.values(), GOOD):
        assert template_syntax.fault(template) is None
    talk = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    assert template_syntax.fault(talk + "{% break %}{% endfor %}") is None
    called = "{{ raise_exception('no') }}{{ strftime_now('%Y') }}{{ tools | tojson }}"
    assert template_syntax.fault(called) is None


def test_without_jinja2_a_note_says_that_nothing_was_checked(
    models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(template_syntax, "checkable", lambda: False)
    path = config(tmp_path, models, BROKEN["an open loop"][0])
    assert cli.main(["merge", path, str(tmp_path / "out"), "--dry-run"]) == 0
    assert template_syntax.NOT_CHECKED in capsys.readouterr().out
    path = config(tmp_path, models, "chatml")
    assert cli.main(["merge", path, str(tmp_path / "out"), "--dry-run"]) == 0
    assert template_syntax.NOT_CHECKED not in capsys.readouterr().out


def test_a_broken_template_of_a_model_is_noted(models, tmp_path, capsys):
    pytest.importorskip("jinja2")
    for model in models:
        write(tmp_path / model / "chat_template.jinja", BROKEN["an open loop"][0])
    path = config(tmp_path, models, "auto")
    assert cli.main(["merge", path, str(tmp_path / "out"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "that chat template is not valid Jinja: line 1" in told
