"""Depths and numbers of layers are those of the configuration, where it has them."""

import pytest

from jaxarith.commands.merge import gradients
from jaxarith.stream import stacks


def stack(name, count):
    return [f"{name}.{i}.w" for i in range(count)]


def test_layers_that_predict_further_tokens_are_at_the_end():
    config = {"num_hidden_layers": 5, "num_nextn_predict_layers": 1}
    names = [*stack("model.layers", 6), "lm_head.weight"]
    found = gradients.depths(names, config)
    assert list(found.values()) == [0, 0.25, 0.5, 0.75, 1, 1, 0]
    assert stacks.layers(names, config) == 5
    inner = gradients.depths([*stack("model.layers", 5), "mtp.layers.0.w"], config)
    assert inner["mtp.layers.0.w"] == 1 and inner["model.layers.4.w"] == 1


@pytest.mark.parametrize("order", [1, -1])
def test_a_language_model_beside_a_larger_encoder(order):
    names = [*stack("visual.blocks", 8), *stack("model.layers", 5)][::order]
    names += ["visual.merger.mlp.0.w", "visual.merger.mlp.2.w"]
    config = {"num_hidden_layers": 5, "vision_config": {"depth": 8}}
    for given in (config, {"text_config": {"num_hidden_layers": 5}} | config):
        assert stacks.layers(names, given) == 5
        found = gradients.depths(names, given)
        assert found["visual.blocks.7.w"] == found["model.layers.4.w"] == 1
        assert found["model.layers.2.w"] == 0.5
        assert found["visual.merger.mlp.2.w"] == 0  # no layer


def test_encoders_and_decoders_have_depths_of_their_own():
    names = [*stack("encoder.layers", 5), *stack("decoder.layers", 3), "x.0.w"]
    config = {"encoder_layers": 5, "decoder_layers": 3, "num_hidden_layers": 5}
    found = gradients.depths(names, config)
    assert found["encoder.layers.2.w"] == found["decoder.layers.1.w"] == 0.5
    assert found["x.0.w"] == 0
    assert stacks.layers(names, config) == 5


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 40}])
def test_names_count_where_the_configuration_does_not(config):
    names = [*stack("h", 3), "head.0.w"]
    assert gradients.depths(names, config) == gradients.depths(names)
    assert stacks.layers(names, config) == 3
