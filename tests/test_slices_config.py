"""config.json of a model whose layers come from other places."""

import pytest

from jaxarith.stream.layer_configs import Layer, disagreements, restacked
from jaxarith.stream.stacked import depths, main_stack

FULL, SLIDING = "full_attention", "sliding_attention"


def config(count, **more):
    return {"model_type": "m", "num_hidden_layers": count, **more}


def layers(config, count, *indices, label="A"):
    return [Layer(config, count, index, label) for index in indices]


def test_lists_of_layers_come_from_the_models_of_the_layers():
    a = config(3, layer_types=[FULL, SLIDING, FULL], no_rope_layers=[1, 0, 1])
    b = config(2, layer_types=[SLIDING, SLIDING], no_rope_layers=[0, 0])
    picked = [*layers(a, 3, 2, 1), *layers(b, 2, 1, label="B"), *layers(a, 3, 0)]
    new, notes = restacked(a, 3, picked)
    assert new == config(
        4,
        layer_types=[FULL, SLIDING, SLIDING, FULL],
        no_rope_layers=[1, 0, 0, 1],
    )
    assert not notes


def test_numbers_of_layers_change_with_the_layers():
    a = config(
        4, mlp_only_layers=[0, 3], cross_attention_layers=[], max_window_layers=4
    )
    new, _ = restacked(a, 4, layers(a, 4, 3, 1, 0, 2, 3))
    assert new["mlp_only_layers"] == [0, 2, 4]
    assert new["cross_attention_layers"] == []
    assert new["max_window_layers"] == 5
    new, _ = restacked(a | {"max_window_layers": 28}, 4, layers(a, 4, 0))
    assert new["max_window_layers"] == 28


def test_counts_of_first_layers_follow_them():
    a = config(4, first_k_dense_replace=2)
    assert restacked(a, 4, layers(a, 4, 0, 0, 1, 2))[0]["first_k_dense_replace"] == 3
    with pytest.raises(ValueError, match="first_k_dense_replace .* do not come first"):
        restacked(a, 4, layers(a, 4, 2, 0))
    # What layer_types says too need not be said twice.
    a = config(4, max_window_layers=2, layer_types=[FULL, FULL, SLIDING, SLIDING])
    assert restacked(a, 4, layers(a, 4, 2, 0))[0]["layer_types"] == [SLIDING, FULL]


def test_the_language_model_within_a_larger_one():
    text = config(3, layer_types=[FULL, SLIDING, FULL])
    whole = {"text_config": text, "vision_config": config(3), "architectures": ["X"]}
    new, _ = restacked(whole, 3, layers(whole, 3, 1, 1))
    assert new["text_config"] == config(2, layer_types=[SLIDING, SLIDING])
    assert new["vision_config"] == config(3)
    assert new["architectures"] == ["X"]


def test_rules_by_a_layers_number_are_kept_or_refused():
    a = config(4, sliding_window_pattern=2)
    assert restacked(a, 4, layers(a, 4, 0, 1, 0, 3))[0]["num_hidden_layers"] == 4
    with pytest.raises(ValueError, match="sliding_window_pattern .* is 2: .* layer 1"):
        restacked(a, 4, layers(a, 4, 0, 2))
    a |= {"layer_types": [FULL, SLIDING] * 2}
    assert restacked(a, 4, layers(a, 4, 0, 2))[0]["layer_types"] == [FULL, FULL]
    a = config(4) | {"model_type": "gemma2"}
    with pytest.raises(ValueError, match="no layer_types, and layers of gemma2"):
        restacked(a, 4, layers(a, 4, 0, 2))


REFUSED = {
    "cache_layer_ids": [0, 2],
    "kv_source_layers": [0, 0, 2, 2],
    "rope_scaling_layers": [0, 1, 2, 3],
    "moe_layer_end_index": 3,
    "attention_types": [[["global", "local"], 2]],
    "num_kv_shared_layers": 2,
    "num_nextn_predict_layers": 1,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_known_is_refused_by_name(key):
    a = config(4, **{key: REFUSED[key]})
    with pytest.raises(ValueError, match=key):
        restacked(a, 4, layers(a, 4, 0, 1))


def test_numbers_that_are_not_known_are_told():
    a = config(2, num_adapter_layers=3, attn_layer_offset=4, sparse_layers=0)
    new, [note] = restacked(a, 2, layers(a, 2, 0, 1, 1))
    assert new == a | {"num_hidden_layers": 3}
    assert "keeps num_adapter_layers: it is not known whether" in note


def test_configurations_of_transformers_stay_if_the_layers_do():
    """And they still load if the layers are there twice."""
    transformers = pytest.importorskip("transformers")
    for name in ("Qwen3", "Gemma3Text", "Llama4Text", "GptOss", "Lfm2", "Jamba"):
        found = getattr(transformers, f"{name}Config")().to_dict()
        count = found["num_hidden_layers"]
        for stacked in ([*range(count)], [*range(count)] * 2):
            new, _ = restacked(found, count, layers(found, count, *stacked))
            assert new["num_hidden_layers"] == len(stacked)
            again = getattr(transformers, f"{name}Config")(**new).to_dict()
            kinds = {
                k: v for k, v in again.items() if k in ("layer_types", "moe_layers")
            }
            assert kinds == {k: new[k] for k in kinds}
            if len(stacked) == count:
                assert new == found


def test_lists_that_are_no_layers_stay():
    a = config(2, eos_token_id=[0, 1], architectures=["A", "B"], extra=[])
    new, _ = restacked(a, 2, layers(a, 2, 0, 1, 1))
    assert new == a | {"num_hidden_layers": 3}


def test_a_model_that_lists_nothing_is_like_the_others_or_refused():
    a, b = config(2, layer_types=[FULL, FULL]), config(2)
    picked = [*layers(a, 2, 0), *layers(b, 2, 1, label="B")]
    new, [note] = restacked(a, 2, picked)
    assert new["layer_types"] == [FULL, FULL]
    assert "B has no layer_types" in note
    assert restacked(b, 2, picked)[0] == config(2)
    a = config(2, layer_types=[FULL, SLIDING])
    picked = [*layers(a, 2, 0), *layers(b, 2, 1, label="B")]
    with pytest.raises(ValueError, match="config.json of B has no list layer_types"):
        restacked(a, 2, picked)
    with pytest.raises(ValueError, match="layer_types of config.json of A differs"):
        restacked(b, 2, picked)
    with pytest.raises(ValueError, match="does not state the 3 layers"):
        restacked(a, 3, picked)


def test_layers_of_two_kinds_that_are_merged_are_told():
    a, b = config(2, layer_types=[FULL, FULL]), config(2, layer_types=[FULL, SLIDING])
    rows = [[*layers(a, 2, i), *layers(b, 2, i, label="B")] for i in range(2)]
    [note] = disagreements(rows)
    assert note.startswith("layer 1: layer_types is 'full_attention' in A and 'sliding")


def stack(prefix, count):
    return [f"{prefix}.{i}.w" for i in range(count)]


def test_the_stack_is_that_of_the_language_model():
    names = [*stack("vision_tower.layers", 2), *stack("model.layers", 3), "head.w"]
    assert main_stack(names, {"num_hidden_layers": 3}) == ("model.layers", 3)
    assert main_stack(stack("transformer.h", 2), {}) == ("transformer.h", 2)
    assert main_stack(stack("bert.encoder.layer", 2), {}) == ("bert.encoder.layer", 2)
    with pytest.raises(ValueError, match="one stack of layers; found none"):
        main_stack(["w"], {})
    with pytest.raises(ValueError, match="found encoder.block, decoder.block"):
        main_stack([*stack("encoder.block", 2), *stack("decoder.block", 2)], {})


def test_depths_are_those_within_a_slice():
    names = [*stack("h", 6)[3:6], "head.w"]
    found = depths(names, "h", 3, 3)
    assert found == {"h.3.w": 0.0, "h.4.w": 0.5, "h.5.w": 1.0, "head.w": 0.0}
    assert depths(["h.7.w"], "h", 7, 1) == {"h.7.w": 1.0}
