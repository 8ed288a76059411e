"""Configurations that compute differently with tensors of the same shapes."""

import json

import checkpoints
import numpy as np
import pytest

from jaxarith import cli
from jaxarith.stream import configs

LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "transformers_version": "4.40.0",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads is 8, but 4 in the base"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, but 2 in the base"),
        ({"model_type": "mistral"}, "model_type 'mistral' and the base 'llama'"),
    ],
)
def test_other_heads_and_types_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        configs.compare(LLAMA, LLAMA | change, "m")


def test_heads_of_parts_are_compared_too():
    base = {"model_type": "clip", "text_config": {"num_attention_heads": 2}}
    model = {"model_type": "clip", "text_config": {"num_attention_heads": 4}}
    with pytest.raises(ValueError, match=r"text_config.num_attention_heads is 4"):
        configs.compare(base, model, "m")


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", but "silu" in the base'),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, but 1e-06 in the base"),
        ({"rope_theta": 1e6}, "rope.theta is 1000000.0, but 10000.0 in the base"),
        ({"rope_scaling": {"type": "linear"}}, 'rope.kind is "linear"'),
        ({"sliding_window": 4096}, "only m states in config.json: sliding_window"),
    ],
)
def test_the_rest_is_noted_key_by_key(change, note):
    [found] = configs.compare(LLAMA, LLAMA | change, "m")
    assert note in found


def test_one_computation_in_other_words_makes_no_notes():
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "transformers_version": "5.0.0",
        "rope_scaling": None,
        "sliding_window": None,
        "dtype": "bfloat16",
    }
    assert configs.compare(LLAMA, new, "m") == []
    assert configs.compare({}, LLAMA, "m") == configs.compare({}, {}, "m") == []


def test_a_language_model_is_compared_with_the_part_that_is_one():
    base = {"model_type": "qwen2_vl", "text_config": LLAMA | {"model_type": "q_text"}}
    [note] = configs.compare(base, LLAMA, "m")
    assert "only the language models are compared" in note
    with pytest.raises(ValueError, match="other heads"):
        configs.compare(base, LLAMA | {"num_attention_heads": 8}, "m")
    tower = {"model_type": "clip", "vision_config": {"model_type": "clip_v", "a": 1}}
    notes = configs.compare(tower, {"model_type": "clip_v", "a": 2}, "m")
    assert "vision_config" in notes[0] and "a is 2, but 1 in the base" in notes[1]


def test_a_model_without_a_configuration_is_noted(tmp_path, capsys):
    """Slices, whose layers it describes, need it."""
    stack = {f"layers.{i}.up.weight": (4, 4) for i in range(2)}
    folders = [
        checkpoints.write(
            tmp_path / name,
            {k: np.full(shape, number, np.float32) for k, shape in stack.items()},
            config={"model_type": "any", "num_hidden_layers": 2},
        )
        for number, name in enumerate("ab")
    ]
    (tmp_path / "b" / "config.json").unlink()
    told = "b) has no config.json, so heads, positions and activations were not"
    dry = ("--out", str(tmp_path / "out"), "--dry-run")
    models = [part for folder in folders for part in ("--model", str(folder))]
    assert cli.main(["merge", "--method", "average", *models, *dry]) == 0
    assert told in capsys.readouterr().out
    sources = [{"model": str(x), "layer_range": [0, 1]} for x in folders]
    slices = [{"sources": [source]} for source in sources]
    content = {"merge_method": "passthrough", "slices": slices}
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    for _ in range(2):
        assert cli.main(["merge", str(tmp_path / "c.yaml"), *dry]) == 1
        assert "b has no config.json. Slices need" in capsys.readouterr().err
        content["slices"].reverse()
        (tmp_path / "c.yaml").write_text(json.dumps(content))


def test_the_notes_are_printed_and_written(tmp_path, capsys):
    folders = [
        checkpoints.write(
            tmp_path / act, checkpoints.tensors(0), config=LLAMA | {"hidden_act": act}
        )
        for act in ("silu", "gelu")
    ]
    models = [part for folder in folders for part in ("--model", str(folder))]
    out = tmp_path / "out"
    assert cli.main(["merge", "--method", "average", *models, "--out", str(out)]) == 0
    assert 'hidden_act is "gelu"' in capsys.readouterr().err
    assert "hidden_act" in str(json.loads((out / "jaxarith_merge.json").read_text()))
