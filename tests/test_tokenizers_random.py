"""Random vocabularies beside the rules in plain Python, token by token."""

import json

import numpy as np
import pytest
from checks import assert_close
from merge_command import write
from safetensors.numpy import save_file

from jaxarith import cli, hub

TOKENS = [f"t{i}" for i in range(14)]
NAMES = ("a", "b", "c")
EMBEDDING, HEAD, REST = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
)
WIDTH = 3


def made(root, rng):
    """Three models by name: the ids of their tokens, and their tensors."""
    found = {}
    for name in NAMES:
        size = int(rng.integers(4, len(TOKENS)))
        words = [str(x) for x in rng.permutation(TOKENS)[:size]]
        added = int(rng.integers(0, 3))
        rows = size + int(rng.integers(-1, 3))  # fewer than tokens, or more
        tensors = {
            key: rng.normal(size=(rows, WIDTH)).astype("f4")
            for key in (EMBEDDING, HEAD)
        }
        tensors[REST] = rng.normal(size=WIDTH).astype("f4")
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        config = {"model_type": "x", "vocab_size": rows}
        (root / name / "config.json").write_text(json.dumps(config))
        ids = {token: i for i, token in enumerate(words)}
        entries = [{"id": ids[x], "content": x} for x in words[size - added :]]
        plain = {x: i for x, i in ids.items() if i < size - added}
        content = {"added_tokens": entries, "model": {"vocab": plain}}
        (root / name / "tokenizer.json").write_text(json.dumps(content))
        found[name] = (ids, tensors, words[size - added :])
    return found


def united(models):
    """The ids of a union: the first model's, further words, then added tokens."""
    tokens = list(models["a"][0])
    every = [x for name in NAMES for x in models[name][2] if x in known(models, name)]
    for name in NAMES:
        tokens += [x for x in known(models, name) if x not in tokens and x not in every]
    tokens += [x for x in dict.fromkeys(every) if x not in tokens]
    return {token: i for i, token in enumerate(tokens)}


def known(models, name):
    """The tokens of a model that have a row, by their ids."""
    ids, tensors, _ = models[name]
    return [token for token, i in ids.items() if i < len(tensors[EMBEDDING])]


def row_of(models, key, name, token, base, asked):
    """The row of a token for one of the models."""

    def own(model, of=token):
        return models[model][1][key][models[model][0][of]]

    having = [model for model in NAMES if token in known(models, model)]
    source, force = asked.get(token, (None, False))
    if name in having and not force:
        return own(name)
    if source == "zero" or not (having or source):
        return np.zeros(WIDTH)
    if source is not None:
        return own(*source)
    if len(having) == 1 or base in having:
        return own(base if base in having else having[0])
    return np.mean([own(model) for model in having], axis=0)


@pytest.mark.parametrize("seed", range(16))
def test_random_vocabularies_follow_the_rules(seed, tmp_path):
    rng = np.random.default_rng(seed)
    models = made(tmp_path, rng)
    base = "a" if seed % 2 else None
    source = ("union", "a", "c")[seed % 3]
    multiple = (None, 4)[seed % 4 // 2]
    asked, lines = {}, []
    for token in rng.permutation([*TOKENS, "new"])[:4]:
        token, force = str(token), bool(rng.integers(2))
        donor = str(rng.choice(NAMES))
        of = str(rng.choice(known(models, donor)))
        asked[token] = ("zero" if rng.integers(3) == 0 else (donor, of), force)
        kind = f"kind: model_token, model: {tmp_path / donor}, token: {of}"
        kind = "kind: zero" if asked[token][0] == "zero" else kind
        lines.append(
            f"    {token}: {{source: {{{kind}}}, force: {str(force).lower()}}}"
        )
    text = [
        "merge_method: linear",
        *([f"base_model: {tmp_path / base}"] if base else []),
        "models:",
        *(f"- {{model: {tmp_path / x}, parameters: {{weight: 1}}}}" for x in NAMES),
        f"tokenizer:\n  source: {source if source == 'union' else tmp_path / source}",
        *([f"  pad_to_multiple_of: {multiple}"] if multiple else []),
        "  tokens:",
        *lines,
    ]
    path = write(tmp_path / "c.yaml", "\n".join(text))
    assert cli.main(["merge", path, str(tmp_path / "out"), "--quiet"]) == 0
    ids = united(models) if source == "union" else dict(models[source][0])
    for token in asked:
        ids.setdefault(token, len(ids))
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    added = {x["content"]: x["id"] for x in content["added_tokens"]}
    assert content["model"]["vocab"] | added == ids
    found = hub.read(tmp_path / "out")
    count = -(-len(ids) // multiple) * multiple if multiple else len(ids)
    assert hub.read_json(tmp_path / "out")["vocab_size"] == count
    for key in (EMBEDDING, HEAD):
        expected = np.zeros((count, WIDTH))
        for token, i in ids.items():
            rows = [row_of(models, key, x, token, base, asked) for x in NAMES]
            expected[i] = np.mean(rows, axis=0)
        expected[len(ids) :] = expected[: len(ids)].mean(axis=0)
        assert_close(found[key], expected, 1e-6)
