"""Merges of models whose vocabularies differ, to that of one tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checks import assert_close
from merge_command import fails, write
from safetensors.numpy import save_file

from jaxarith import cli, hub
from jaxarith.commands.merge import model_card

WIDTH = 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEMPLATES = {
    "base": "{% for m in messages %}<a>{{ m['content'] }}{% endfor %}",
    "chat": "{% for m in messages %}<b>{{ m['role'] }} {{ m['content'] }}{% endfor %}",
}
# Words and added tokens of the three tokenizers, in the order of their ids.
WORDS = {
    "base": (["the", "cat", "sat"], []),
    "chat": (["the", "dog", "cat", "ran"], ["<chat>"]),
    "code": (["def", "the", "ran"], ["<chat>", "<code>"]),
}
SPECIAL = ["<unk>", "<s>", "</s>"]


def save_tokenizer(folder, words, added, template):
    import tokenizers
    import transformers

    ids = {token: i for i, token in enumerate([*SPECIAL, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    named = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    whole.add_tokens(added, special_tokens=True)
    whole.chat_template = template
    whole.save_pretrained(folder)
    return whole


@pytest.fixture(scope="module")
def models(torch, tmp_path_factory):
    """Llamas of three vocabularies; the last one has two rows more than tokens."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    for i, (name, (words, added)) in enumerate(WORDS.items()):
        tokens = save_tokenizer(folder / name, words, added, TEMPLATES.get(name))
        torch.manual_seed(i)
        config = transformers.LlamaConfig(
            vocab_size=len(tokens) + 2 * (name == "code"),
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in WORDS}


def ids_of(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {x["content"]: x["id"] for x in content["added_tokens"]}
    return content["model"]["vocab"] | added


@pytest.fixture
def merged(tmp_path, models):
    """A function that merges models by their names: the folder, ids and tensors."""

    def run(text, *flags):
        number = len(list(tmp_path.iterdir()))
        path = write(tmp_path / f"{number}.yaml", text.format(**models))
        out = tmp_path / f"out-{number}"
        assert cli.main(["merge", path, str(out), "--quiet", *flags]) == 0
        return out, ids_of(out), hub.read(out)

    return run


@pytest.fixture
def rows(models):
    """By model, its rows by token of an embedding or a head."""
    found = {name: (hub.read(x), ids_of(Path(x))) for name, x in models.items()}

    def of(name, model, token):
        tensors, ids = found[model]
        return tensors[name][ids[token]]

    return of


LINEAR = """
merge_method: linear
models:
- {{model: {base}, parameters: {{weight: 1}}}}
- {{model: {chat}, parameters: {{weight: 2}}}}
- {{model: {code}, parameters: {{weight: 1}}}}
"""
BASED = LINEAR.replace("models:", "base_model: {base}\nmodels:")


def mean(*weighted):
    return sum(w * row for w, row in weighted) / sum(w for w, _ in weighted)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_union_has_the_tokens_of_all_in_order_of_models(name, merged, rows):
    _, ids, found = merged(LINEAR + "tokenizer_source: union\n")
    assert list(ids) == [
        *(*SPECIAL, "the", "cat", "sat"),
        *("dog", "ran", "def", "<chat>", "<code>"),
    ]
    assert [*ids.values()] == list(range(11))
    found = found[name]
    assert found.shape == (11, WIDTH)

    def of(token, *models):
        return [rows(name, model, token) for model in models]

    # All have it: each has its own row.
    a, b, c = of("the", "base", "chat", "code")
    assert_close(found[ids["the"]], mean((1, a), (2, b), (1, c)), 1e-6)
    # Two of three have it: the third one gets their mean.
    a, b = of("cat", "base", "chat")
    assert_close(found[ids["cat"]], mean((1, a), (2, b), (1, (a + b) / 2)), 1e-6)
    b, c = of("<chat>", "chat", "code")
    assert_close(found[ids["<chat>"]], mean((1, (b + c) / 2), (2, b), (1, c)), 1e-6)
    # One has it: the others get its row.
    for token, model in (("sat", "base"), ("dog", "chat"), ("<code>", "code")):
        assert_close(found[ids[token]], rows(name, model, token), 1e-6)


def test_tokens_that_the_new_vocabulary_lacks_are_told(models, tmp_path, capsys):
    path = write(
        tmp_path / "c.yaml", BASED.format(**models) + "tokenizer_source: base\n"
    )
    assert cli.main(["merge", path, str(tmp_path / "out"), "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    ids = {name: ids_of(Path(folder)) for name, folder in models.items()}
    for name in ("chat", "code"):
        lost = [repr(x) for x in ids[name] if x not in ids["base"]]
        note = f"{name} has {len(lost)} tokens that the new vocabulary lacks"
        assert lost and note in told
        assert all(token in told for token in lost)
    assert "base has" not in told


def test_no_note_names_files_that_are_written_anew(models, tmp_path, capsys):
    text = LINEAR.format(**models) + "tokenizer_source: union\n"
    path = write(tmp_path / "c.yaml", text)
    assert cli.main(["merge", path, str(tmp_path / "out")]) == 0
    assert "tokenizer.json" not in capsys.readouterr().err


def test_a_base_gives_the_rows_that_it_has(merged, rows):
    _, ids, found = merged(BASED + "tokenizer_source: union\n")
    a, b = (rows(EMBEDDING, model, "cat") for model in ("base", "chat"))
    assert_close(found[EMBEDDING][ids["cat"]], mean((1, a), (2, b), (1, a)), 1e-6)
    text = BASED.replace("linear", "task_arithmetic")
    _, ids, found = merged(text + "tokenizer_source: union\n")
    expected = a + 2 * (b - a)
    assert_close(found[EMBEDDING][ids["cat"]], expected, 1e-6)
    # What the base lacks and one model has is that model's, whatever the weights.
    dog = rows(EMBEDDING, "chat", "dog")
    np.testing.assert_array_equal(found[EMBEDDING][ids["dog"]], dog)


def test_the_order_of_models_changes_ids_and_no_rows(merged, rows):
    lines = LINEAR.strip().splitlines()
    _, ids, found = merged(LINEAR + "tokenizer_source: union\n")
    other = "\n".join([*lines[:2], lines[3], lines[4], lines[2]])
    _, others, again = merged(other + "\ntokenizer_source: union\n")
    assert ids.keys() == others.keys() and ids != others
    for name in (EMBEDDING, HEAD):
        for token, row in ids.items():
            assert_close(again[name][others[token]], found[name][row], 1e-6)
    _, same, third = merged(LINEAR + "tokenizer_source: union\n")
    assert same == ids
    np.testing.assert_array_equal(third[EMBEDDING], found[EMBEDDING])


def test_a_base_alone_keeps_its_vocabulary(merged, models, rows):
    out, ids, found = merged(BASED + "tokenizer_source: base\n")
    assert ids == ids_of(hub.find(models["base"]))
    assert found[EMBEDDING].shape == (6, WIDTH)
    a, b = (rows(EMBEDDING, model, "cat") for model in ("base", "chat"))
    assert_close(found[EMBEDDING][ids["cat"]], mean((1, a), (2, b), (1, a)), 1e-6)
    source, target = (hub.find(models["base"]), out)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (source / file).read_bytes() == (target / file).read_bytes()


def test_another_model_brings_its_tokenizer_and_its_special_ids(
    torch, merged, models, tmp_path
):
    transformers = pytest.importorskip("transformers")
    chat = tmp_path / "turned"
    shutil.copytree(models["chat"], chat)
    (chat / "chat_template.jinja").write_text(TEMPLATES["chat"])
    # Its special tokens have other ids, and it ends a turn by another token.
    tokens = ["ran", "</s>", "the", "<unk>", "dog", "<s>", "cat"]
    content = json.loads((chat / "tokenizer.json").read_text())
    content["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    for entry in content["added_tokens"]:
        entry["id"] = (
            tokens.index(entry["content"]) if entry["content"] in tokens else 7
        )
    (chat / "tokenizer.json").write_text(json.dumps(content))
    config = hub.read_json(chat)
    del config["bos_token_id"]
    (chat / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    text = BASED.replace("{chat}", str(chat)) + f"tokenizer_source: {chat}\n"
    out, ids, _ = merged(text)
    assert ids["<chat>"] == 7 and ids["<s>"] == 5
    config = hub.read_json(out)
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, 5)
    generation = hub.read_json(out, "generation_config.json")
    assert generation["eos_token_id"] == [7, 1] and generation["bos_token_id"] == 5
    notes = json.loads((out / "jaxarith_merge.json").read_text())["notes"]
    assert any("eos_token_id is now 7, in place of 2" in note for note in notes)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] == 8


def test_rows_that_the_file_names(merged, rows):
    tokens = """
  pad_to_multiple_of: 8
  tokens:
    sat: {{source: {{kind: zero}}}}
    dog: {{source: {{kind: model_token, model: {code}, token: ran}}, force: true}}
    ran: {{source: {{kind: model_token, model: {chat}, token_id: 1}}}}
    cat: {{source: {chat}}}
    <new>: {{source: {{kind: model_token, model: {base}, token: the}}}}
    <none>: {{}}
"""
    out, ids, found = merged(LINEAR + "tokenizer:\n  source: union" + tokens)
    assert list(ids)[-2:] == ["<new>", "<none>"]
    found = found[EMBEDDING]

    def of(model, token):
        return rows(EMBEDDING, model, token)

    assert_close(found[ids["sat"]], of("base", "sat") / 4, 1e-6)
    assert_close(found[ids["dog"]], of("code", "ran"), 1e-6)
    b, c, filled = of("chat", "ran"), of("code", "ran"), of("chat", "<s>")
    assert_close(found[ids["ran"]], mean((1, filled), (2, b), (1, c)), 1e-6)
    a, b = of("base", "cat"), of("chat", "cat")
    assert_close(found[ids["cat"]], mean((1, a), (2, b), (1, b)), 1e-6)
    assert_close(found[ids["<new>"]], of("base", "the"), 1e-6)
    assert not found[ids["<none>"]].any()
    # Padding is the mean row, of each model and so of the linear merge.
    assert found.shape == (16, WIDTH) and len(ids) == 13
    for row in found[13:]:
        assert_close(row, found[:13].mean(0), 1e-6)
    assert hub.read_json(out)["vocab_size"] == 16
    recipe = json.loads((out / "jaxarith_merge.json").read_text())["recipe"]
    _, again, tensors = merged(
        model_card.dump(recipe).replace("{", "{{").replace("}", "}}")
    )
    assert again == ids
    np.testing.assert_array_equal(tensors[EMBEDDING], found)


def test_the_union_loads_and_speaks(torch, merged, models):
    transformers = pytest.importorskip("transformers")
    text = BASED + "tokenizer: {{pad_to_multiple_of: 4}}\nchat_template: auto\n"
    out, ids, _ = merged(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == ids
    assert tokenizer("the dog sat<chat>").input_ids == [
        ids[token] for token in ("the", "dog", "sat", "<chat>")
    ]
    assert tokenizer.decode([ids["def"], ids["<code>"]]) == "def <code>"
    # Two templates with one vote each: the first one named.
    assert tokenizer.chat_template == TEMPLATES["base"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 12
    texts = torch.tensor([[ids["<chat>"], ids["dog"]]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert model.generate(texts, **options).shape[0] == 1


def test_chat_templates(merged, models):
    template = "{% for m in messages %}\n{{ m['content'] }}{% endfor %}"
    quoted = json.dumps(template).replace("{", "{{").replace("}", "}}")
    one = (
        "merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {NAME}}}]\n"
    )
    text = one.replace("NAME", "base")
    out, _, _ = merged(f"{text}chat_template: {quoted}\n")
    assert (out / "chat_template.jinja").read_text() == template
    # Of a model without a template there is none to choose.
    text = one.replace("NAME", "code")
    out, _, _ = merged(f"{text}chat_template: auto\n")
    assert not (out / "chat_template.jinja").exists()


def test_models_of_one_vocabulary_keep_all_rows(merged, models):
    """Rows beyond the tokens as well, which mergekit cuts off."""
    text = """
merge_method: linear
base_model: {code}
models: [{{model: {code}, parameters: {{weight: 1}}}}]
tokenizer_source: SOURCE
"""
    for source in ("base", "union"):
        _, _, found = merged(text.replace("SOURCE", source))
        np.testing.assert_array_equal(
            found[EMBEDDING], hub.read(models["code"])[EMBEDDING]
        )


def test_slices_have_one_vocabulary(torch, merged, rows):
    transformers = pytest.importorskip("transformers")
    text = """
merge_method: passthrough
slices:
- sources: [{{model: {base}, layer_range: [0, 1]}}]
- sources: [{{model: {chat}, layer_range: [0, 1]}}]
tokenizer_source: union
"""
    out, ids, found = merged(text)
    for name, owner in ((EMBEDDING, "base"), (HEAD, "chat")):
        assert found[name].shape == (9, WIDTH)
        np.testing.assert_array_equal(found[name][ids["cat"]], rows(name, owner, "cat"))
        np.testing.assert_array_equal(
            found[name][ids["dog"]], rows(name, "chat", "dog")
        )
        np.testing.assert_array_equal(
            found[name][ids["sat"]], rows(name, "base", "sat")
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (9, 2)


def test_an_adapters_rows_are_those_of_the_sum(torch, merged, models, tmp_path, rows):
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(models["chat"])
    options = {"r": 2, "target_modules": ["embed_tokens"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    adapted.save_pretrained(tmp_path / "adapter")
    whole = adapted.merge_and_unload().state_dict()[EMBEDDING].numpy()
    name = f"{models['chat']}+{tmp_path / 'adapter'}"
    text = BASED.replace("{chat}", name) + "tokenizer_source: union\n"
    _, ids, found = merged(text)
    own = ids_of(hub.find(models["chat"]))
    a, b = rows(EMBEDDING, "base", "cat"), whole[own["cat"]]
    assert_close(found[EMBEDDING][ids["cat"]], mean((1, a), (2, b), (1, a)), 1e-6)
    assert_close(found[EMBEDDING][ids["dog"]], whole[own["dog"]], 1e-6)


@pytest.mark.parametrize("source", ["base", "union"])
def test_tied_heads_have_the_rows_of_the_embedding(source, torch, merged, models):
    """A file that lacks the head, and one that holds it twice."""
    transformers = pytest.importorskip("transformers")
    folder = Path(models["base"]).parent
    tied = {}
    for name in ("base", "chat"):
        tied[name] = str(folder / f"tied-{name}")
        if Path(tied[name]).exists():
            continue
        model = transformers.AutoModelForCausalLM.from_pretrained(models[name])
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(tied[name])
        for file in Path(models[name]).glob("tokenizer*"):
            shutil.copy(file, tied[name])
    assert HEAD not in hub.read(tied["base"])
    text = BASED.replace("{base}", tied["base"]).replace("{chat}", tied["chat"])
    text = "\n".join(line for line in text.splitlines() if "{code}" not in line)
    out, ids, found = merged(f"{text}\ntokenizer_source: {source}\n")
    assert HEAD not in found
    assert found[EMBEDDING].shape[0] == len(ids) == {"base": 6, "union": 9}[source]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_head_of_other_rows_is_refused(models, tmp_path, capsys):
    odd = tmp_path / "odd"
    shutil.copytree(models["chat"], odd)
    tensors = hub.read(odd)
    tensors[HEAD] = tensors[HEAD][:-1]
    save_file(tensors, odd / "model.safetensors")
    text = BASED.replace("{base}", str(odd)).format(**models)
    path = write(tmp_path / "c.yaml", text + "tokenizer_source: union\n")
    message = fails(capsys, path, tmp_path / "out")
    assert (
        "lm_head.weight of" in message
        and "has 7 rows, but its embedding has 8" in message
    )


def test_mistakes_are_told(models, tmp_path, capsys):
    def message(text):
        path = write(tmp_path / "c.yaml", text.format(**models))
        return fails(capsys, path, tmp_path / "out")

    block = BASED + "tokenizer:\n  tokens:\n    "
    found = message(block + "cat: {{source: nowhere}}\n")
    assert "c.yaml, line 10: nowhere is not one of the merged models" in found
    found = message(block + "dog: {{source: {base}}}\n")
    assert "c.yaml, line 10: " in found and "has no row for the token 'dog'" in found
    found = message(
        block + "dog: {{source: {{kind: model_token, model: {base}, token_id: 6}}}}\n"
    )
    assert "has no row for the token 6; it has 6 rows" in found
    assert not (tmp_path / "out").exists()


def test_a_union_needs_files_of_tokenizers(models, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(models["chat"], bare)
    (bare / "tokenizer.json").unlink()
    text = BASED.replace("{chat}", str(bare)).format(**models)
    path = write(tmp_path / "c.yaml", text + "tokenizer_source: base\n")
    # Without any tokenizer, its tokens are those of the base: here, with a row more.
    assert cli.main(["merge", path, str(tmp_path / "out")]) == 0
    assert "bare has no tokenizer; its tokens are assumed" in capsys.readouterr().err
    (bare / "tokenizer.model").write_bytes(b"x")
    path = write(tmp_path / "c.yaml", text + "tokenizer_source: union\n")
    assert "bare has no tokenizer.json" in fails(capsys, path, tmp_path / "out2")
