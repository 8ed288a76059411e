"""YAML files of mergekit's form: what they mean."""

import dataclasses

import jax
import jax.numpy as jnp
import merge_files
import numpy as np
import pytest
from checks import assert_close
from merge_files import NAMES, SLERP, TIES, random_tree

from jaxarith import merge
from jaxarith.commands.merge import gradients, model_card
from jaxarith.commands.merge import (
    recipe as merge_recipe,
)
from jaxarith.commands.merge.request import MergeRequest, Model
from jaxarith.merge import mergekit

base, taus, read = merge_files.base, merge_files.taus, merge_files.read  # fixtures


def request(method, models, *, parameters, **options):
    """A request to merge a number of models, with the same parameters for all."""
    return MergeRequest(
        method,
        models=tuple(Model(f"m{i}", {}) for i in range(models)),
        parameters={n: gradients.constant(value) for n, value in parameters.items()},
        **options,
    )


def test_ties_has_the_weights_and_densities_of_each_model(read, base, taus):
    recipe = read(TIES)
    expected = mergekit.generalized_task_arithmetic(
        base,
        taus,
        method="ties",
        weight=[0.3, 0.1],
        density=[0.5, 0.25],
        normalize=False,
    )
    assert_close(recipe.merge(base, taus), expected, 1e-6)
    ours = merge.ties(base, taus, density=0.5)
    assert any(not np.allclose(ours[name], expected[name]) for name in base)
    assert (recipe.base, recipe.models) == ("base", ("math", "code"))
    assert recipe.dtype == "bfloat16"


def test_notes_say_where_mergekit_differs_and_what_has_no_effect(read):
    notes = "\n".join(read(TIES).notes)
    assert "trims every tensor separately" in notes
    assert "int8_mask has no effect" in notes
    assert "cast once (mergekit computes in bfloat16)" in notes
    text = TIES.replace("    # no", "    parameters: {weight: 1}\n    # no")
    assert "in line 4, have no effect" in "\n".join(read(text).notes)


def test_the_preset_of_papers_takes_our_options(read, base, taus):
    recipe = read("""
merge_method: ties
preset: paper
base_model: base
models: [{model: math}, {model: code}]
parameters: {density: 0.5, coef: 0.7}
""")
    assert_close(
        recipe.merge(base, taus), merge.ties(base, taus, density=0.5, coef=0.7), 1e-6
    )
    assert not recipe.notes


def test_linear_counts_the_base_among_its_models(read, base, taus):
    recipe = read("""
merge_method: linear
base_model: base
models:
- {model: math, parameters: {weight: 2}}
- {model: base, parameters: {weight: 0.5}}
- {model: code}
parameters: {weight: 1.5, normalize: true}
out_dtype: float16
""")
    assert (recipe.base, recipe.models) == (None, ("base", "math", "code"))
    models = [base, *taus]
    zero = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    weights = np.array([0.5, 2, 1.5]) / 4
    expected = {
        n: sum(w * m[n] for w, m in zip(weights, models, strict=True)) for n in NAMES
    }
    assert_close(recipe.merge(zero, models), expected, 1e-6)
    assert recipe.dtype == "float16"


def test_gradients_and_filters_give_the_numbers_computed_by_hand(read, base, taus):
    recipe = read(SLERP)
    assert (recipe.base, recipe.models) == (None, ("a", "b"))
    positions = {name: 0.5 for name in NAMES}
    for layer, t in enumerate([0, 0.5, 0.3, 0.7, 1]):
        positions[f"model.layers.{layer}.self_attn.q_proj.weight"] = t
        positions[f"model.layers.{layer}.mlp.up_proj.weight"] = 1 - 0.2 * layer
    zero = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    expected = mergekit.slerp(zero, taus, t=positions.get)
    actual = recipe.merge(zero, taus)
    assert_close(actual, expected, 1e-6)
    for name in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        away = np.abs(np.asarray(actual[name]) - taus[0][name]).max()
        assert (away < 1e-6) == (name != "lm_head.weight")


def test_a_gradient_per_model_interpolates_over_layers(read, base, taus):
    recipe = read("""
merge_method: task_arithmetic
base_model: base
models:
- {model: math, parameters: {weight: [0, 1]}}
- {model: code, parameters: {weight: [1, 0, 0.5]}}
parameters: {lambda: 2.0}
""")
    first = [0, 0.25, 0.5, 0.75, 1]
    second = [1, 0.5, 0, 0.25, 0.5]
    weights = {name: (0, 1) for name in NAMES}  # outside of the layers: depth 0
    for name in NAMES:
        if ".layers." in name:
            layer = int(name.split(".")[2])
            weights[name] = first[layer], second[layer]
    expected = {
        name: base[name] + 2 * (a * taus[0][name] + b * taus[1][name])
        for name, (a, b) in weights.items()
    }
    assert_close(recipe.merge(base, taus), expected, 1e-6)


def test_what_no_filter_of_the_model_fits_is_looked_for_at_the_top(read, base, taus):
    recipe = read("""
merge_method: ties
base_model: base
models:
- model: math
  parameters:
    weight: {filter: mlp, value: 0.25}
    density: [{filter: norm, value: 0.5}]
- {model: code}
parameters: {weight: 0.75}
""")

    def weight(path):
        return [0.25 if "mlp" in path else 0.75, 0.75]

    def density(path):  # mergekit's default is 1
        return [0.5 if "norm" in path else 1.0, 1.0]

    expected = mergekit.generalized_task_arithmetic(
        base, taus, method="ties", weight=weight, density=density
    )
    assert_close(recipe.merge(base, taus), expected, 1e-6)


def test_filters_that_fit_no_tensor_are_known(read, base):
    recipe = read("""
merge_method: task_arithmetic
base_model: base
models:
- {model: math, parameters: {weight: [{filter: mpl, value: 1}, {value: 0.5}]}}
parameters: {lambda: [{filter: mlp, value: 2}, {filter: "*", value: 1}]}
""")
    assert recipe.unused_filters(base) == ["mpl"]


def test_the_settings_of_a_slice_count_before_those_at_the_top(read, base, taus):
    text = SLERP.replace("merge_method", "    parameters: {t: 0.25}\nmerge_method")
    zero = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    assert_close(read(text).merge(zero, taus), mergekit.slerp(zero, taus, t=0.25), 1e-6)


def test_each_stack_has_depths_of_its_own():
    names = [
        "encoder.block.0.layer.1.w",
        "encoder.block.2.layer.0.w",
        "decoder.block.1.layer.0.w",
        "decoder.block.4.layer.2.w",
        "pooler.layers.0.w",
        "shared.weight",
    ]
    assert gradients.depths(names) == dict(
        zip(names, [0, 1, 0.25, 1, 1, 0], strict=True)
    )


def test_random_methods_depend_on_the_seed_alone(read, base, taus):
    text = """
merge_method: dare_ties
base_model: base
models: [{model: math}, {model: code}]
parameters: {weight: 0.5, density: 0.5}
"""
    one, same, other = (read(text, seed=seed).merge(base, taus) for seed in (3, 3, 4))
    assert all(np.array_equal(one[name], same[name]) for name in NAMES)
    assert any(not np.array_equal(one[name], other[name]) for name in NAMES)
    expected = mergekit.generalized_task_arithmetic(
        base, taus, method="dare_ties", weight=0.5, density=0.5, key=jax.random.key(3)
    )
    assert all(np.array_equal(one[name], expected[name]) for name in NAMES)


ONE = ("wise_ft", "nearswap", "passthrough", "arcee_fusion")  # take one model


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        (preset, name)
        for preset, table in merge_recipe.PRESETS.items()
        for name in table
    ],
)
def test_every_method_runs_under_pytorchs_names(preset, name, base, taus):
    method = merge_recipe.find(name, preset)
    one = name in ONE
    models = taus[:1] if one else taus
    given = {key: 0.5 for key, option in method.options.items() if option.required}
    given |= {"clusters": 1} if name == "bases" else {}
    asked = request(name, len(models), parameters=given, preset=preset)
    if method.base == "needed":
        with pytest.raises(ValueError, match="needs a base"):
            merge_recipe.build(asked)
        asked = dataclasses.replace(asked, base="base")
    recipe = merge_recipe.build(asked)
    params = recipe.merge(base, models)
    moved = [n for n in NAMES if not np.allclose(params[n], base[n], atol=1e-3)]
    assert moved
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    if name == "wudi":  # the weights of layers, and neither embeddings nor the head
        assert {n.split(".")[1] for n in moved} == {"layers"}


def test_every_option_reaches_its_function(base, taus):
    """A wrong name would be a TypeError, a wrong type mostly an error of the method."""
    for preset, table in merge_recipe.PRESETS.items():
        for name, method in table.items():
            given = {}
            for key, option in method.options.items():
                samples = {float: 0.5, int: 2, bool: True, str: ".*"}
                is_word = isinstance(option.kind, tuple)
                given[key] = option.kind[0] if is_word else samples[option.kind]
            given |= {"epsilon": 0.1} if "epsilon" in given else {}
            given |= {"clip": 0.1} if "clip" in given else {}
            given |= {"into": "ties"} if "into" in given else {}
            given |= {"negative": -0.5} if "negative" in given else {}
            given |= {"gamma": 0.9} if "beta" in given else {}
            given |= {"ratio": 2.0} if "ratio" in given else {}
            given |= {"solver": "closed"} if "time" in given else {}
            few = 1 if name in ONE else 2
            base_model = None if method.base == "input" else "base"
            asked = request(name, few, parameters=given, preset=preset, base=base_model)
            params = merge_recipe.build(asked).merge(base, taus[:few])
            assert params.keys() == base.keys()


def test_matrices_of_gpt2_need_a_pattern_and_the_notes_say_so(base, taus):
    given = {"common": 0.5}  # with 0.8 matrices as small have one subspace
    recipe = merge_recipe.build(request("iso_cts", 2, parameters=given, base="base"))
    assert any("[output, input]" in note for note in recipe.notes)
    given |= {"in_out": ".*q_proj.*"}
    transposed = merge_recipe.build(
        request("iso_cts", 2, parameters=given, base="base")
    )
    assert not transposed.notes
    a, b = recipe.merge(base, taus), transposed.merge(base, taus)
    differing = {name for name in NAMES if not np.allclose(a[name], b[name], atol=1e-4)}
    assert differing == {name for name in NAMES if "q_proj" in name}


def test_what_the_card_shows_is_a_file_that_gives_the_same_merge(read, base, taus):
    recipe = read(TIES)
    again = read(model_card.dump(recipe.request.as_file()))
    assert_close(again.merge(base, taus), recipe.merge(base, taus), 1e-6)
    assert again.request == recipe.request


def test_a_request_is_written_as_the_file_that_it_came_from(read):
    content = {
        "merge_method": "ties",
        "preset": "mergekit",
        "base_model": "base",
        "models": [
            {"model": "base"},
            {"model": "math", "parameters": {"density": 0.5, "weight": [0.5, 0.25]}},
            {
                "model": "code",
                "parameters": {"weight": [{"filter": "mlp", "value": [1.0, 0.0]}]},
            },
        ],
        "parameters": {
            "weight": [{"filter": "*", "value": 0.25}, {"value": 0.75}],
            "normalize": False,
            "int8_mask": True,
        },
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "tokenizer_source": "math",
    }
    found = read(model_card.dump(content)).request.as_file()
    assert model_card.dump(found) == model_card.dump(content)


def test_a_request_of_a_slice_has_its_settings_first(read):
    text = SLERP.replace("merge_method", "    parameters: {t: 0.25}\nmerge_method")
    found = read(text).request.as_file()
    assert "layers" not in found
    assert found["models"] == [{"model": "a"}, {"model": "b"}]
    assert found["parameters"]["t"][:2] == [
        {"value": 0.25},
        {"filter": "self_attn", "value": [0.0, 0.5, 0.3, 0.7, 1.0]},
    ]


def test_anchors_and_merge_keys_are_understood(read, base, taus):
    recipe = read("""
merge_method: linear
models:
- model: math
  parameters: &shared {weight: 0.5, }
- model: code
  parameters: {<<: *shared}
""")
    zero = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    expected = {n: (taus[0][n] + taus[1][n]) / 2 for n in NAMES}
    assert_close(recipe.merge(zero, taus), expected, 1e-6)


def test_values_are_taken_as_numbers_of_jax(read, base, taus):
    """Ints and texts of YAML become floats before they are interpolated."""
    recipe = read("""
merge_method: task_arithmetic
base_model: base
models: [{model: math}]
parameters: {weight: [0, "1e0"]}
""")
    params = recipe.merge(base, taus[:1])
    name = "model.layers.1.norm.weight"
    np.testing.assert_allclose(
        params[name], jnp.asarray(base[name]) + 0.25 * taus[0][name], rtol=1e-6
    )


def test_bases_are_the_means_of_clusters(base):
    vectors = [random_tree(seed) for seed in (1, 2)]
    # The last is near the first, and so of its cluster.
    near = {n: x + 0.01 * random_tree(3)[n] for n, x in vectors[0].items()}
    taus = [*vectors, near]
    given = {"clusters": 2, "coef": 0.5}
    asked = request("bases", 3, parameters=given, base="base")
    params = merge_recipe.build(asked).merge(base, taus)
    found = merge.basis_vectors(base, taus, clusters=2)
    assert found.clusters == [[0, 2], [1]]
    expected = merge.task_arithmetic(base, found.vectors, coef=0.5)
    for name in NAMES:
        np.testing.assert_allclose(params[name], expected[name], atol=1e-6)
