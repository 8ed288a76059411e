"""Classification files, the tasks made of them, and tokens."""

import csv
import json

import numpy as np
import pytest

from jaxarith.data import pipeline, splits, text

GOOD = [{"text": "a fine film", "label": "1"}, {"text": "it was bad", "label": "0"}]
PAIRS = [
    {"text": "one , two", "text_pair": 'he said "three"', "label": "yes"},
    {"text": "four", "text_pair": "five", "label": "no"},
]


def write(folder, name, content, encoding="utf-8"):
    (folder / name).write_bytes(content.encode(encoding))
    return folder / name


def numbered(labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "label\ttext\n1\ta fine film\n0\tit was bad\n"),
        (
            "a.tsv",
            "index\tsentence\tlabel\r\n7\ta fine film\t1\r\n8\tit was bad\t0\r\n",
        ),
        ("a.csv", "\ufefftext,label\na fine film,1\n\nit was bad,0"),
        (
            "a.jsonl",
            '{"text": "a fine film", "label": 1}\n{"label": 0, "text": "it was bad"}\n',
        ),
        ("a.txt", "1 a fine film\n0 it was bad \n"),
        ("a.all", "1\ta fine film\n\n0 it was bad"),
    ],
)
def test_every_format_gives_the_same_records(tmp_path, name, content):
    assert text.read(write(tmp_path, name, content)) == GOOD


@pytest.mark.parametrize("names", [names for names in text.COLUMNS if len(names) == 2])
def test_pairs_are_found_by_the_names_of_their_columns(tmp_path, names):
    first, second = names
    rows = [(r["text"], r["text_pair"], r["label"]) for r in PAIRS]
    lines = ["\t".join(row) for row in [(first, second, "label"), *rows]]
    assert text.read(write(tmp_path, "a.tsv", "\n".join(lines))) == PAIRS
    quoted = [
        ",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows
    ]
    lines = [f"{first},{second},label", *quoted]
    assert text.read(write(tmp_path, "a.csv", "\n".join(lines))) == PAIRS
    objects = [
        json.dumps(dict(zip([first, second, "label"], row, strict=True)))
        for row in rows
    ]
    assert text.read(write(tmp_path, "a.jsonl", "\n".join(objects))) == PAIRS


def test_quotes_mean_nothing_in_a_tsv_file(tmp_path):
    file = write(tmp_path, "a.tsv", 'text\tlabel\n" open\t0\nnext "\t1\n')
    assert [record["text"] for record in text.read(file)] == ['" open', 'next "']


def test_files_of_another_encoding_are_read_when_asked_and_split_at_newlines_only(
    tmp_path,
):
    # In Latin-1, byte 0x85 is a character at which str.splitlines would split.
    file = write(tmp_path, "a.txt", "0 cr\xe8me\x85br\xfbl\xe9e\n1 b", "latin-1")
    found = text.read(file, encoding="latin-1")
    assert [record["text"] for record in found] == ["crème\x85brûlée", "b"]
    file = write(tmp_path, "b.txt", "0 crème")
    assert text.read(file)[0]["text"] == "crème"


def test_bytes_that_are_not_utf8_are_an_error_with_their_line(tmp_path):
    file = write(tmp_path, "a.csv", "label,text\n1,a\n2,\xff\n", "latin-1")
    with pytest.raises(ValueError, match=r"a.csv, line 3 is not in utf-8.*latin-1"):
        text.read(file)


def test_bad_lines_are_left_out_when_asked_and_counted(tmp_path):
    lines = ["label,text", "1,good", "2,\xff", "3", "nan,b", ",c", "4,good too"]
    file = write(tmp_path, "a.csv", "\n".join(lines), "latin-1")
    with pytest.warns(UserWarning, match="4 of 6 records .* Line 3 has bytes that"):
        found = text.read(file, skip_bad=True)
    assert [record["text"] for record in found] == ["good", "good too"]
    objects = ['{"label": NaN, "text": "a"}', "{", '{"label": 0, "text": "b"}']
    file = write(tmp_path, "a.jsonl", "\n".join(objects))
    with pytest.warns(UserWarning, match="2 of 3 records .* Line 1 has no label"):
        assert text.read(file, skip_bad=True) == [{"label": "0", "text": "b"}]


def test_long_cells_are_read_and_the_limit_of_others_stays(tmp_path):
    before = csv.field_size_limit()
    file = write(tmp_path, "a.csv", f"label,text\n1,{'x' * 200_000}\n")
    assert len(text.read(file)[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_messages_about_wide_tables_are_short(tmp_path, name):
    content = ",".join(f"c{i}" for i in range(10**5)) + "\n1\n"
    if name == "a.jsonl":
        content = json.dumps({"label": 1, "text": list(range(10**5))})
    with pytest.raises(ValueError) as error:
        text.read(write(tmp_path, name, content))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "empty"),
        ("a.txt", "\n\n", "empty"),
        ("a.csv", "text,label\n", "only a header"),
        ("a.txt", "0 good\n1\n", "line 2 has no text"),
        ("a.tsv", "text\tlabel\na\t0\nb\t \n", "line 3 has no label"),
        ("a.tsv", "text\tlabel\na\t0\nb\n", "line 3 has 1 cell, but"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b"}', "line 2 has no label"),
        ("a.jsonl", '{"text": null, "label": 0}', "line 1 has no text"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is not a JSON object"),
        ("a.csv", 'text,label\n"a,0\n', "line 2: unexpected end"),
        ("a.tsv", "tweet\tlabel\na\t0\n", "columns tweet, label. It needs label, and"),
        ("a.csv", "text,class\na,0\n", "columns text, class"),
        ("a.csv", "label,text,label\n1,a,2\n", "has the column label twice"),
        ("a.tsv", "label\ttext\ttext\n1\ta\tb\n", "has the column text twice"),
        ("a.jsonl", '{"label": 1, "text": "a", "label": 2}', "line 1 .* a key twice"),
        ("a.jsonl", '{"label": NaN, "text": "a"}', "line 1 has no label"),
        ("a.csv", "label,text\nnan,a\n", "line 2 has no label"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON: it is nested"),
    ],
)
def test_a_broken_file_says_what_is_wrong_with_it(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        text.read(write(tmp_path, name, content))
    assert name in str(error.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="absent.tsv: no such file"):
        text.read(tmp_path / "absent.tsv")


def test_a_test_part_that_is_given_leaves_the_papers_split():
    records = numbered([str(i % 3) for i in range(60)])
    task = text.task("mine", records, test=records[:6])
    train, validation = splits.train_validation(60)
    assert [record["text"] for record in task.validation] == [
        f"text {i}" for i in validation
    ]
    assert [record["text"] for record in task.train] == [
        f"text {i}" for i in sorted(train)
    ]
    assert [record["label"] for record in task.test] == [0, 1, 2, 0, 1, 2]


def test_parts_that_are_split_off_are_disjoint_and_lose_nothing():
    records = numbered([str(i % 2) for i in range(57)])
    task = text.task("mine", records)
    assert [len(task.train), len(task.validation), len(task.test)] == [47, 5, 5]
    found = [r["text"] for r in [*task.train, *task.validation, *task.test]]
    assert sorted(found) == sorted(record["text"] for record in records)


def test_classes_are_sorted_by_value_or_by_name():
    labels = ["10", "9", "-1", "10"]
    task = text.task("mine", numbered(labels), numbered(["9"]), numbered(["10"]))
    assert task.classes == ("-1", "9", "10")
    assert [record["label"] for record in task.train] == [2, 1, 0, 2]
    assert [task.validation[0]["label"], task.test[0]["label"]] == [1, 2]
    task = text.task("mine", numbered(["b", "10", "a"]), numbered("a"), numbered("b"))
    assert task.classes == ("10", "a", "b")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((["0", "1"], ["0"], ["2", "1"]), "test has labels that train lacks: 2"),
        ((["0", "1"], ["up"], ["0"]), "validation has labels that train lacks: up"),
        ((["0", "0"], ["0"], ["0"]), "every training record has the label '0'"),
        ((["0", "1"], ["0"], None), "2 training records are too few"),
        ((["0", "1"], [], ["0"]), "no record in validation"),
        (([], ["1"], ["0"]), "no record in train"),
    ],
)
def test_a_task_that_cannot_be_learnt_is_an_error(parts, message):
    parts = [None if part is None else numbered(part) for part in parts]
    with pytest.raises(ValueError, match=message):
        text.task("mine", *parts)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="makes the tokenizers")


@pytest.fixture(scope="module")
def bert(transformers):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d".split()
    return transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})


@pytest.fixture(scope="module")
def gpt2(transformers):
    vocab = {w: i for i, w in enumerate(["<|endoftext|>", "Ġ", "a", "b", "c"])}
    return transformers.GPT2Tokenizer(vocab=vocab, merges=[])


def test_pairs_are_padded_and_cut_as_transformers_does(bert):
    records = [
        {"text": "a b", "text_pair": "c", "label": 1},
        {"text": "a b c d", "text_pair": "d d", "label": 0},
    ]
    source = text.encode(bert, records, 8)
    assert source[0]["input_ids"].tolist() == [2, 5, 6, 3, 7, 3, 0, 0]
    assert source[0]["attention_mask"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert source[0]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    # Nine tokens: the longer text gives one away.
    assert source[1]["input_ids"].tolist() == [2, 5, 6, 7, 3, 8, 8, 3]
    batch = pipeline.collate(source)
    assert {name: value.dtype.name for name, value in batch.items()} == {
        "input_ids": "int32",
        "attention_mask": "int32",
        "token_type_ids": "int32",
        "label": "int32",
    }
    expected = bert(
        ["a b", "a b c d"],
        ["c", "d d"],
        padding="max_length",
        truncation=True,
        max_length=8,
        return_tensors="np",
    )
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(batch[name], expected[name])


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_of_text(gpt2):
    records = [{"text": "ab", "label": 0}, {"text": "abcab", "label": 1}]
    first, second = text.encode(gpt2, records, 4)
    assert gpt2.pad_token is None
    assert first["input_ids"].tolist() == [2, 3, gpt2.eos_token_id, gpt2.eos_token_id]
    assert first["attention_mask"].tolist() == [1, 1, 0, 0]
    assert second["input_ids"].tolist() == [2, 3, 4, 2]
    assert "token_type_ids" not in first


def test_some_records_without_their_pair_are_an_error(bert):
    records = [{"text": "a", "text_pair": "b", "label": 1}, {"text": "a", "label": 0}]
    with pytest.raises(ValueError, match="1 of 2 records have a text_pair"):
        text.encode(bert, records, 8)


def test_labels_are_numbers_of_classes_or_scores(bert):
    (row,) = text.encode(bert, [{"text": "a", "label": 3.8}], 4)
    assert row["label"] == np.float32(3.8)
    with pytest.raises(ValueError, match="'yes'.* is not a number"):
        text.encode(bert, [{"text": "a", "label": "yes"}], 4)


def test_sequences_are_padded_on_either_side_and_never_cut():
    ids, mask = text.pad([[1, 2], [], [3, 4, 5]], 3, 9)
    assert ids.tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5]]
    assert mask.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    ids, mask = text.pad([[1, 2], [], [3, 4, 5]], 3, 9, side="left")
    assert ids.tolist() == [[9, 1, 2], [9, 9, 9], [3, 4, 5]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match="3 tokens; expected at most 2"):
        text.pad([[1, 2, 3]], 2, 0)
    with pytest.raises(ValueError, match="side is 'top'"):
        text.pad([[1]], 2, 0, side="top")


def test_a_tokenizer_larger_than_the_embedding_is_an_error(bert):
    text.check_vocabulary(bert, 9)
    with pytest.raises(
        ValueError, match="ids up to 8, but the model's embedding has 8"
    ):
        text.check_vocabulary(bert, 8)


def test_tokenizers_load_from_their_folder_alone(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = text.load_tokenizer(tmp_path)
    assert loaded.get_vocab() == bert.get_vocab()


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "t5", None])
def test_a_folder_without_a_tokenizer_is_an_error(transformers, tmp_path, kind):
    if kind:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    found = "config.json" if kind else "nothing"
    with pytest.raises(ValueError, match=f"transformers can read; it holds .*{found}"):
        text.load_tokenizer(tmp_path)
