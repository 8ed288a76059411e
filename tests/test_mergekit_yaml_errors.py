"""What is wrong in a YAML file of mergekit's form is told, with its line."""

import jax
import merge_files
import pytest
from merge_files import SLERP, TIES

from jaxarith.commands.merge import mergekit_yaml

base, taus, read = merge_files.base, merge_files.taus, merge_files.read  # fixtures


def replaced(old, new):
    assert old in TIES
    return TIES.replace(old, new)


MISTAKES = {
    "an unknown key": (TIES + "modules: {}\n", 17, "key 'modules' of the file"),
    "no method": (replaced("merge_method: ties", ""), 2, "states no merge_method"),
    "unknown method": (replaced(": ties", ": magic"), 11, "no method 'magic'; .*ties"),
    "passthrough of three models": (
        TIES.split("    # no")[0]
        + "  - model: math\nmerge_method: passthrough\nbase_model: base\n",
        5,
        "passthrough takes 1 model; found base, math",
    ),
    "unknown parameter": (
        replaced("  int8_mask", "  int9_mask"),
        15,
        "key 'int9_mask' of parameters of ties is not supported; .*density",
    ),
    "parameter of a model": (replaced("density: 0.25", "depth: 1"), 9, "key 'depth'"),
    "shared parameter": (
        replaced("density: 0.25", "lambda: 0.25"),
        9,
        "lambda of ties has one value for all models",
    ),
    "not a number": (replaced("1e-1", "heavy"), 10, "weight is 'heavy'; .* a number"),
    "infinite": (replaced("1e-1", ".inf"), 10, "weight is inf"),
    "not a switch": (replaced("normalize: false", "normalize: 2"), 14, "true or false"),
    "gradient of a switch": (
        replaced("ize: false", "ize: [true, false]"),
        14,
        "a list",
    ),
    "empty gradient": (replaced("1e-1", "[]"), 10, "weight must be a list; .* empty"),
    "mixed list": (
        replaced("1e-1", "[{value: 1}, 2]"),
        10,
        "must be a mapping; found 2",
    ),
    "no value": (replaced("1e-1", "{filter: mlp}"), 10, "entry of weight has no value"),
    "odd condition": (replaced("1e-1", "{valve: 1}"), 10, "key 'valve' of weight"),
    "nested": (replaced("1e-1", "{value: {value: 1}}"), 10, "found a mapping"),
    "no base": (replaced("base_model: base", ""), 11, "needs a base model"),
    "no weight": (replaced("weight: 1e-1", ""), 11, "ties needs weight of code"),
    "no models": (
        TIES.split("merge_method")[0][:9] + "\nmerge_method: ties",
        2,
        "list",
    ),
    "model twice": (replaced("- model: code", "- model: math"), 7, "twice, .* line 5"),
    "model without a name": (replaced("- model: code", "- lora: x"), 7, "key 'lora'"),
    "no such dtype": (replaced("bfloat16", "int3"), 16, "dtype is 'int3'; .*float32"),
    "two tokenizers": (
        TIES + "tokenizer_source: union\ntokenizer: {source: base}\n",
        18,
        "there is a tokenizer_source as well",
    ),
    "key of a tokenizer": (
        TIES + "tokenizer:\n  source: base\n  token: {x: {source: base}}\n",
        19,
        "key 'token' of tokenizer",
    ),
    "key of a token": (
        TIES + "tokenizer:\n  tokens: {x: {sauce: base}}\n",
        18,
        "key 'sauce' of the token x",
    ),
    "kind of a token": (
        TIES + "tokenizer:\n  tokens: {x: {source: {kind: one}}}\n",
        18,
        "kind is 'one'; it must be one of model_token, zero",
    ),
    "row of no token": (
        TIES + "tokenizer:\n  tokens: {x: {source: {kind: model_token, model: m}}}\n",
        18,
        "a model_token has a model, and a token or a token_id",
    ),
    "no force": (TIES + "tokenizer:\n  tokens: {x: {force: 1}}\n", 18, "force is 1"),
    "no multiple": (
        TIES + "tokenizer:\n  pad_to_multiple_of: 0\n",
        18,
        "pad_to_multiple_of is 0",
    ),
    "template by name": (
        TIES + "chat_template: vicuna\n",
        17,
        "chat_template is 'vicuna'; .*one of chatml, llama3, alpaca",
    ),
    "preset": (TIES + "preset: ours\n", 17, "preset is 'ours'; .* paper, mergekit"),
    "number beyond floats": (replaced("0.25", "1" * 400), 9, "it must be a number"),
    "key twice": (TIES + "dtype: float32\n", 16, "key 'dtype' is given twice"),
    "models and slices": (TIES + "slices: []\n", 2, "either models or slices"),
    "not YAML": (TIES + "x: ]\n", 17, "this is not YAML"),
    "a Python object": (TIES + "preset: !!python/name:os.system\n", 17, "not YAML"),
    "contains itself": ("a: &a\n  b: *a\n", 1, "contains itself"),
    "slice without sources": (
        SLERP.replace("merge_method", "  - {sources: []}\nmerge_method"),
        8,
        "sources must be a list",
    ),
    "ranges of other lengths": (
        SLERP.replace("[0, 5]", "[2, 5]", 1),
        6,
        r"layer_range is \[0, 5\], of 5 layers, but that of a has 3",
    ),
    "range backwards": (SLERP.replace("[0, 5]", "[5, 2]"), 5, "0 <= first"),
    "no layers": (SLERP.replace("[0, 5]", "[3, 3]"), 2, "slices have no layers"),
    "half a range": (SLERP.replace("[0, 5]", "[0]"), 5, r"range is \[0\]; it must"),
    "no range": (
        SLERP.replace("        layer_range: [0, 5]\n", "", 1),
        4,
        "needs a layer_range",
    ),
    "two sources to pass through": (
        SLERP.split("parameters")[0].replace("slerp", "passthrough"),
        3,
        "passthrough takes 1 source in a slice; found 2",
    ),
    "after slices": (
        SLERP.replace("[0, 5]", "[1, 5]") + "after: [svc]\n",
        8,
        "svc changes the vector of whole models",
    ),
    "base without a range": (
        SLERP.split("merge_method")[0]
        .replace("[0, 5]", "[1, 5]", 1)
        .replace("[0, 5]", "[0, 4]", 1)
        + "merge_method: task_arithmetic\nbase_model: c\nparameters: {weight: 1}\n",
        3,
        "base model c is not one of the sources, and their ranges differ",
    ),
    "no base in a slice": (
        SLERP.split("merge_method")[0].replace("[0, 5]", "[1, 5]")
        + "merge_method: task_arithmetic\nparameters: {weight: 1}\n",
        3,
        "merges task vectors. Name a base_model",
    ),
    "residual": (
        SLERP.replace("merge_method", "    residual_weight: 1\nmerge_method"),
        8,
        "residual_weight",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_file_and_the_line(read, mistake):
    text, line, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=rf"config\.yaml, line {line}: .*{message}"):
        read(text)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe\x00", b"a: \x00"])
def test_what_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        mergekit_yaml.read(path)


def test_aliases_cannot_make_a_small_file_large(read):
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    with pytest.raises(ValueError, match="key 'a0'"):
        read("\n".join(["a0: &a0 [x]", *levels]))


def test_a_filter_that_leaves_tensors_without_a_weight_is_told(read, base, taus):
    recipe = read("""
merge_method: linear
models:
- {model: math, parameters: {weight: [{filter: mlp, value: 1}]}}
- {model: code, parameters: {weight: 1}}
""")
    with pytest.raises(
        ValueError, match="no filter of weight of math fits the tensor lm_head"
    ):
        recipe.merge(base, taus)


def test_wrong_options_are_found_from_shapes_alone(read, base, taus):
    text = """
merge_method: ties
base_model: base
models:
- {model: math, parameters: {weight: 1}}
- {model: code, parameters: {weight: 1}}
parameters: {density: 0.5}
"""
    no_values = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in base.items()}
    read(text).check(no_values, [no_values] * 2)
    with pytest.raises(
        ValueError, match=r"density of .* is 1.5; it must be in \[0, 1\]"
    ):
        read(text.replace("0.5", "1.5")).check(no_values, [no_values] * 2)


def test_slices_must_have_all_layers(read, base, taus):
    recipe = read(SLERP.replace("[0, 5]", "[0, 4]"))
    with pytest.raises(ValueError, match="slice has 4 layers and the models have 5"):
        recipe.merge(base, taus)
