"""Vocabularies in the files of tokenizers."""

import json

import pytest

from jaxarith.hub import tokenizer_files


def saved(folder, model, added=(), settings=None):
    content = {"added_tokens": list(added), "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = tokenizer_files.read(folder)
    assert found is not None
    return found


def token(content, row, **more):
    return {"id": row, "content": content, "special": True, **more}


def test_vocabularies_are_mappings_or_lists_of_pieces(tmp_path):
    found = saved(tmp_path, {"vocab": {"a": 0, "b": 1}}, [token("<x>", 2)])
    assert found.ids == {"a": 0, "b": 1, "<x>": 2}
    assert found.size == 3
    found = saved(tmp_path, {"vocab": [["<unk>", 0.0], ["▁a", -1.5]]})
    assert found.ids == {"<unk>": 0, "▁a": 1}


def test_settings_may_have_further_added_tokens(tmp_path):
    decoder = {"0": {"content": "a"}, "3": {"content": "<y>", "special": True}}
    settings = {"added_tokens_decoder": decoder}
    found = saved(tmp_path, {"vocab": {"a": 0, "b": 1}}, [token("<x>", 2)], settings)
    assert found.ids["<y>"] == 3
    new = tokenizer_files.with_tokens(found, [tokenizer_files.plain("c")])
    assert new.ids["c"] == 4
    assert [x["id"] for x in new.content["added_tokens"]] == [2, 3, 4]
    decoder = tokenizer_files.with_added(settings, new.added)["added_tokens_decoder"]
    assert list(decoder) == ["2", "3", "4"]
    assert decoder["4"]["content"] == "c" and "id" not in decoder["4"]
    assert tokenizer_files.with_added({"x": 1}, new.added) == {"x": 1}


def test_a_word_may_become_an_added_token(tmp_path):
    found = saved(tmp_path, {"vocab": {"a": 0, "b": 1}})
    new = tokenizer_files.with_tokens(found, [{"content": "b", "special": True}])
    assert new.ids == found.ids
    assert new.content["added_tokens"] == [token("b", 1)]
    assert "added_tokens" in found.content and not found.added


def test_ids_with_gaps_take_no_more_tokens(tmp_path):
    found = saved(tmp_path, {"vocab": {"a": 0, "b": 2}})
    with pytest.raises(ValueError, match="ids .* have gaps"):
        tokenizer_files.with_tokens(found, [tokenizer_files.plain("c")])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 3}}'])
def test_what_is_no_tokenizer_is_told(tmp_path, content):
    assert tokenizer_files.read(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="is not a file of the tokenizers library"):
        tokenizer_files.read(tmp_path)


def test_templates_are_in_one_of_three_files(tmp_path):
    assert tokenizer_files.template(tmp_path) is None
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": named}))
    assert tokenizer_files.template(tmp_path) == "D"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "J"}')
    assert tokenizer_files.template(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert tokenizer_files.template(tmp_path) == "F"


def test_byte_pairs_of_two_tokenizers(tmp_path):
    """The union splits texts as the base does, but for words that others added."""
    tokenizers = pytest.importorskip("tokenizers")
    parts = (tokenizers.models, tokenizers.pre_tokenizers, tokenizers.trainers)
    models, pre_tokenizers, trainers = parts

    def trained(name, text):
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=264, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator([text] * 8, trainer)
        (tmp_path / name).mkdir()
        backend.save(str(tmp_path / name / "tokenizer.json"))
        found = tokenizer_files.read(tmp_path / name)
        assert found is not None
        return backend, found

    base, ours = trained("a", "low lower lowest")
    _, theirs = trained("b", "new newer newest")
    words = [x for x in theirs.ids if x not in ours.ids]
    assert words
    new = tokenizer_files.with_tokens(ours, map(tokenizer_files.plain, words))
    union = tokenizers.Tokenizer.from_str(json.dumps(new.content))
    assert union.get_vocab() == new.ids
    assert union.encode("lower slow").ids == base.encode("lower slow").ids
    assert union.encode("newest").ids != base.encode("newest").ids
