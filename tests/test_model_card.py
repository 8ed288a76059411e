"""The model card: what the Hub and people read, and text that breaks neither."""

import json
import re

import pytest
import yaml

import jaxarith
from jaxarith.commands.merge import model_card
from jaxarith.commands.merge.gradients import constant
from jaxarith.commands.merge.model_card import Input
from jaxarith.commands.merge.request import MergeRequest, Model

DIGEST = "0" * 64
INPUTS = [
    Input(
        model="google-bert/bert-base-uncased",
        role="base",
        local=False,
        sha256={"model.safetensors": DIGEST},
    ),
    Input(model="runs/math", role="model", local=True, sha256={}),
    Input(model="someone/code+me/adapter", role="model", local=False, sha256={}),
]
REQUEST = MergeRequest(
    "iso_cts",
    models=(Model("runs/math", {}), Model("someone/code+me/adapter", {})),
    base="google-bert/bert-base-uncased",
    parameters={"common": constant(0.2)},
)


def card(inputs=INPUTS, command="jaxarith merge a.yaml b", notes=()):
    facts = model_card.data(REQUEST, inputs, command, notes, dtype=None, seed=3)
    return model_card.render("a merged model", facts)


def parts(text):
    """The front matter as data, and the rest."""
    _, front, rest = text.split("---\n", 2)
    return yaml.safe_load(front), rest


def test_the_front_matter_names_models_of_the_hub_and_no_folders():
    front, _ = parts(card())
    assert front == {
        "base_model": ["google-bert/bert-base-uncased", "someone/code", "me/adapter"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "jaxarith", "iso-cts"],
    }
    assert "base_model" not in parts(card(INPUTS[1:2]))[0]


def test_the_card_has_recipe_command_hashes_version_and_notes():
    _, rest = parts(card(notes=["sums in float32"]))
    assert "# a merged model" in rest
    assert "A merge of 2 models by `iso_cts`" in rest
    recipe = re.search(r"```yaml\n(.*?)```", rest, re.DOTALL)[1]
    assert yaml.safe_load(recipe) == {
        "merge_method": "iso_cts",
        "preset": "paper",
        "base_model": "google-bert/bert-base-uncased",
        "models": [{"model": "runs/math"}, {"model": "someone/code+me/adapter"}],
        "parameters": {"common": 0.2},
    }
    assert "```sh\njaxarith merge a.yaml b\n```" in rest
    assert f"model.safetensors: `{DIGEST}`" in rest
    assert jaxarith.__version__ in rest
    assert "- sums in float32" in rest


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "<script>",
        "# title\n# more",
        "![x](y)",
        "a\n```\nb",
        "---\nlicense: mit",
    ],
)
def test_text_of_users_stays_text(text):
    inputs = [Input(model=text, role="base", local=False, sha256={})]
    result = card(inputs, command=f"jaxarith '{text}'", notes=[text])
    front, rest = parts(result)
    assert set(front) == {"library_name", "tags"}
    fence = re.search(r"^(`{3,})sh$", rest, re.MULTILINE)[1]
    command = rest.split(f"{fence}sh\n")[1].split(f"\n{fence}\n")[0]
    assert command == f"jaxarith '{text}'"
    outside = rest.replace(command, "")
    row = next(line for line in outside.splitlines() if "| base |" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert not re.search(r"(?<!\\)[<!]", outside)
    assert outside.count("\n# ") == 1


def test_data_is_plain():
    facts = model_card.data(REQUEST, INPUTS, "c", ("n",), dtype=None, seed=0)
    assert facts["jaxarith"] == jaxarith.__version__
    assert facts["notes"] == ["n"] and facts["seed"] == 0
    assert [model["model"] for model in facts["inputs"]] == [m.model for m in INPUTS]
    assert json.loads(json.dumps(facts)) == facts
