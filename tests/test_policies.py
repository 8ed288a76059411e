import functools
import json

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxarith import hub, merge, stream
from jaxarith.stream import policies

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
HALF = functools.partial(merge.task_arithmetic, coef=0.5)


def write(tmp_path, *models):
    return [checkpoints.write(tmp_path / f"in-{i}", m) for i, m in enumerate(models)]


def merged(tmp_path, *models, **options):
    """The merge of the models after the first one, and what was noted."""
    base, *rest = write(tmp_path, *models)
    opened = stream.open_models(base, rest, **options)
    stream.merge(HALF, opened, tmp_path / "out", quiet=True)
    return hub.read(tmp_path / "out"), " ".join(opened.notes)


def f32(model, **changes):
    return checkpoints.tensors(model, "f32") | changes


def resized(tensors, rows):
    """With another number of tokens, of which the first are the same."""
    grown = {
        name: np.resize(np.arange(rows * 8, dtype=np.float32), (rows, 8))
        for name in EMBEDDINGS
    }
    for name in EMBEDDINGS:
        known = min(rows, len(tensors[name]))
        grown[name][:known] = tensors[name][:known]
    return tensors | grown


def expected(base, model):
    return base + np.float32(0.5) * (model - base)


def without(tensors, *names):
    return {n: x for n, x in tensors.items() if n not in names}


def prefixed(tensors):
    return {f"vision_model.{name}": x for name, x in tensors.items()}


@pytest.mark.parametrize("rows", [40, 56])
def test_other_vocabularies_are_an_error_that_lists_them(rows, tmp_path):
    with pytest.raises(ValueError, match="vocabularies differ") as caught:
        merged(tmp_path, f32(0), resized(f32(1), rows))
    for name in EMBEDDINGS:
        assert f"{name}: 48 rows in the base, but {rows} in model 0" in str(
            caught.value
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [40, 56])
def test_truncate_keeps_the_rows_that_all_have(rows, tmp_path):
    base, model = f32(0), resized(f32(1), rows)
    found, notes = merged(tmp_path, base, model, vocabulary="truncate")
    kept = min(rows, 48)
    for name in EMBEDDINGS:
        want = expected(base[name][:kept], model[name][:kept])
        np.testing.assert_array_equal(found[name], want)
    assert "truncate" in notes


@pytest.mark.parametrize("rows", [40, 56])
def test_base_rows_keeps_those_of_the_base(rows, tmp_path):
    base, model = f32(0), resized(f32(1), rows)
    found, _ = merged(tmp_path, base, model, vocabulary="base-rows")
    kept = min(rows, 48)
    for name in EMBEDDINGS:
        want = base[name].copy()
        want[:kept] = expected(base[name][:kept], model[name][:kept])
        np.testing.assert_array_equal(found[name], want)


def test_skip_takes_these_tensors_from_the_base(tmp_path):
    base, model = f32(0), resized(f32(1), 40)
    found, _ = merged(tmp_path, base, model, vocabulary="skip")
    for name in EMBEDDINGS:
        np.testing.assert_array_equal(found[name], base[name])
    name = "model.layers.0.norm.weight"
    np.testing.assert_array_equal(found[name], expected(base[name], model[name]))


def test_other_shapes_are_always_an_error(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    wide = f32(1, **{name: np.zeros((30, 8), np.float32)})
    for vocabulary in policies.VOCABULARIES:
        folder = tmp_path / vocabulary
        with pytest.raises(ValueError, match=r"up_proj.weight: \[30, 8\] in model 0"):
            merged(folder, f32(0), wide, vocabulary=vocabulary)


def test_missing_and_unknown_tensors_are_an_error_that_lists_them(tmp_path):
    lost = "model.layers.0.norm.weight"
    model = without(f32(1), lost) | {"adapter.weight": np.ones(3, np.float32)}
    with pytest.raises(ValueError) as caught:
        merged(tmp_path, f32(0), model)
    assert f"- {lost} f32[8]: not in the model" in str(caught.value)
    assert "+ adapter.weight f32[3]: not in the base" in str(caught.value)


def test_with_missing_base_they_stay_as_they_are_or_are_left_out(tmp_path):
    lost = "model.layers.0.norm.weight"
    model = without(f32(1), lost) | {"adapter.weight": np.ones(3, np.float32)}
    found, notes = merged(tmp_path, f32(0), model, missing="base")
    np.testing.assert_array_equal(found[lost], f32(0)[lost])
    assert found.keys() == f32(0).keys()
    assert lost in notes and "adapter.weight" in notes


def test_a_head_that_is_tied_in_the_model_alone_is_its_embedding(tmp_path):
    tied = f32(0)
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"].copy()
    model = without(f32(1), "lm_head.weight")
    found, notes = merged(tmp_path, tied, model)
    want = expected(tied["lm_head.weight"], model["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["lm_head.weight"], want)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], want)
    assert "tied" in notes


def test_a_head_that_is_tied_in_the_base_is_left_out_of_the_model(tmp_path):
    base, model = without(f32(0), "lm_head.weight"), f32(1)
    model["lm_head.weight"] = model["model.embed_tokens.weight"].copy()
    found, notes = merged(tmp_path, base, model)
    assert found.keys() == base.keys()
    assert "copy" in notes
    other = model | {"lm_head.weight": model["lm_head.weight"] + 1}
    with pytest.raises(ValueError, match=r"\+ lm_head.weight"):
        merged(tmp_path / "untied", base, other)


def test_equal_norms_are_not_tied(tmp_path):
    # As they are where training begins; the model lacks one of two.
    ones = np.ones(8, np.float32)
    base = f32(0) | {f"model.layers.{i}.norm.weight": ones for i in (0, 1)}
    model = without(f32(1), "model.layers.0.norm.weight")
    with pytest.raises(ValueError, match="- model.layers.0.norm.weight"):
        merged(tmp_path, base, model)


@pytest.mark.parametrize("first", ["base", "stacked"])
def test_layers_that_are_copies_are_layers(first, tmp_path):
    base = f32(0)
    layer = "model.layers.1."
    copies = {
        name.replace(layer, "model.layers.2."): value.copy()
        for name, value in base.items()
        if name.startswith(layer)
    }
    models = (base, base | copies) if first == "base" else (base | copies, base)
    sign = r"\+" if first == "base" else "-"
    with pytest.raises(ValueError, match=rf"{sign} model.layers.2.mlp.down_proj"):
        merged(tmp_path, *models)


def test_a_second_norm_is_no_copy(tmp_path):
    base, name = f32(0), "model.layers.0.norm.weight"
    for second in ("model.layers.0.norm_2.weight", "model.embed_norm.weight"):
        with pytest.raises(ValueError, match=rf"\+ {second}"):
            merged(
                tmp_path / second, base, f32(1) | {name: base[name], second: base[name]}
            )


def test_no_renaming_lets_one_tensor_take_the_place_of_another(tmp_path):
    a, b, c = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    base = {"x.v": a, "x.w": b}
    with pytest.raises(ValueError, match=r"\- x.v"):
        merged(tmp_path, base, {"v": a, "w": b, "x.w": c})


@pytest.mark.parametrize("value", [np.nan, 1e5])
def test_tensors_that_are_copied_are_looked_through_too(value, tmp_path):
    base = f32(0) | {"head.weight": np.full(5, value, np.float32)}
    with pytest.raises(ValueError, match=r"head.weight.* (NaN|overflows)"):
        base, model = write(tmp_path, base, f32(1))
        opened = stream.open_models(base, [model], missing="base")
        stream.merge(HALF, opened, tmp_path / "out", dtype="float16", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sign", ["added", "removed"])
def test_a_prefix_of_all_names_makes_no_difference(sign, tmp_path):
    base, model = f32(0), f32(1)
    if sign == "added":
        base = prefixed(base)
    else:
        model = prefixed(model)
    found, notes = merged(tmp_path, base, model)
    assert found.keys() == base.keys()
    for name, value in f32(1).items():
        if value.dtype == np.float32:
            key = f"vision_model.{name}" if sign == "added" else name
            np.testing.assert_array_equal(found[key], expected(f32(0)[name], value))
    assert "vision_model." in notes


def test_integers_and_buffers_are_the_bases(tmp_path):
    extra = {"model.rotary.mask": np.array([True, False]), "big": np.array(2**60)}
    base = f32(0) | extra
    found, _ = merged(tmp_path, base, f32(1, **{"model.seen": np.array(3)}))
    assert found.keys() == base.keys()
    for name in (*extra, checkpoints.COUNTER):
        np.testing.assert_array_equal(found[name], base[name])


def test_float64_stays_float64(tmp_path):
    name = "model.layers.0.norm.weight"
    wide = {name: f32(0)[name].astype(np.float64)}
    found, _ = merged(tmp_path, f32(0, **wide), f32(1))
    assert found[name].dtype == np.float64
    np.testing.assert_allclose(found[name], expected(f32(0)[name], f32(1)[name]), 1e-6)


def test_policies_that_need_a_base_are_refused_without_one(tmp_path):
    models = write(tmp_path, f32(1), f32(2))
    for options in ({"missing": "base"}, {"vocabulary": "skip"}):
        with pytest.raises(ValueError, match="there is no base"):
            stream.open_models(None, models, **options)
    with pytest.raises(ValueError, match="unknown vocabulary 'cut'; known are error"):
        stream.open_models(None, models, vocabulary="cut")
    with pytest.raises(ValueError, match="no models"):
        stream.open_models(None, [])


def adapted(folder, model, whole):
    """A folder of an adapter that changes the head of a model, and the changed head."""
    rows, width = model["lm_head.weight"].shape
    rng = np.random.default_rng(rows)
    a, b, head = rng.normal(size=(3, rows, rows)).astype("f4")
    a, b, head = a[:2, :width], b[:, :2], head[:, :width]
    prefix = "base_model.model.lm_head"
    factors = {f"{prefix}.lora_A.weight": a.copy(), f"{prefix}.lora_B.weight": b.copy()}
    folder.mkdir()
    save_file(
        {f"{prefix}.weight": head.copy()} if whole else factors,
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, head if whole else model["lm_head.weight"] + b @ a


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("vocabulary", "rows"), [("truncate", 40), ("base-rows", 48)])
def test_adapters_have_the_vocabularies_of_their_models(
    vocabulary, rows, whole, tmp_path
):
    models = [f32(0), resized(f32(1), 40), f32(2)]
    folders = write(tmp_path, *models)
    names, heads = [], []
    for i in (1, 2):
        folder, head = adapted(tmp_path / f"adapter-{i}", models[i], whole)
        names.append(f"{folders[i]}+{folder}")
        heads.append(head)
    opened = stream.open_models(folders[0], names, vocabulary=vocabulary)
    report = stream.merge(HALF, opened, tmp_path / "out", quiet=True)
    base = models[0]["lm_head.weight"][:rows]
    moved = [np.zeros_like(base), np.zeros_like(base)]
    for vector, head in zip(moved, heads, strict=True):
        known = min(rows, len(head))
        vector[:known] = head[:known] - base[:known]
    found = hub.read(tmp_path / "out")["lm_head.weight"]
    np.testing.assert_allclose(found, base + 0.5 * sum(moved), rtol=1e-5, atol=1e-5)
    # What adapters add counts; a base that nobody holds any more is read again.
    assert report.bytes_read >= stream.plan(opened).bytes_in


def test_positions_are_no_vocabulary():
    tensors = {"wpe.weight": jnp.zeros((4, 2)), "wte.weight": jnp.zeros((4, 2))}
    longer = {name: jnp.zeros((5, 2)) for name in tensors}
    with pytest.raises(ValueError, match="wpe.weight"):
        policies.rows(tensors, {"model": longer}, "truncate")
    del longer["wpe.weight"]
    assert policies.rows(tensors, {"model": longer}, "truncate")[0] == {"wte.weight": 4}


def test_packed_weights_of_quantised_models_are_refused(tmp_path):
    name = "model.layers.0.mlp.qweight"
    packed = [np.full((4, 4), i, np.int32) for i in range(2)]
    base, model = (f32(i, **{name: packed[i]}) for i in range(2))
    with pytest.raises(ValueError, match=rf"{name} is a matrix of int32 that differs"):
        merged(tmp_path, base, model)
    assert merged(tmp_path / "same", base, model | {name: packed[0]})


def stored(dtype):
    return hub.Stored.made(np.dtype(dtype), (2, 3), lambda: np.ones((2, 3), dtype))


def test_a_model_with_more_digits_than_the_base_is_noted():
    base = {"a": stored("float16"), "b": stored("float32")}
    _, notes = policies.fit(base, {"a": stored("float32"), "b": stored("f4")}, "m1")
    assert notes == [
        "m1: 1 tensor (a) float32, float16 in the base; the merge has the base's "
        "dtypes, unless a dtype is given (--dtype)"
    ]
    _, notes = policies.fit(base, {"a": stored("f2"), "b": stored("f2")}, "m1")
    assert notes == []
