"""The GLUE tasks: files, T5's format, the papers' parts, scores."""

import sys
import types

import numpy as np
import pytest

from jaxarith.data import glue

TASKS = glue.TASKS


def write(folder, lines, name="train.tsv"):
    file = folder / name
    file.write_bytes("\n".join("\t".join(line) for line in lines).encode())
    return file


# A labelled line of every file as GLUE distributes it, and the record that it holds.
FILES = {
    "cola": (
        None,
        ["gj04", "0", "*", 'They "drank the pub.'],
        {"text": 'They "drank the pub.', "label": 0},
    ),
    "sst2": (
        ["sentence", "label"],
        ["hide new secretions ", "1"],
        {"text": "hide new secretions ", "label": 1},
    ),
    "mrpc": (
        ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["1", "7", "8", 'He said "yes.', '" No, " he said.\r'],
        {"text": 'He said "yes.', "text_pair": '" No, " he said.', "label": 1},
    ),
    "stsb": (
        ["index", "genre", "old_index", "sentence1", "sentence2", "score"],
        ["0", "news", "1", "A plane.", "An air plane.", "3.800"],
        {"text": "A plane.", "text_pair": "An air plane.", "label": 3.8},
    ),
    "qqp": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["0", "1", "2", "Why?", "How?", "0"],
        {"text": "Why?", "text_pair": "How?", "label": 0},
    ),
    "mnli": (
        ["index", "sentence1_parse", "sentence1", "sentence2", "label1", "gold_label"],
        ["0", "(a)", "It rains.", "It is wet.", "neutral", "contradiction"],
        {"text": "It rains.", "text_pair": "It is wet.", "label": 2},
    ),
    "qnli": (
        ["index", "question", "sentence", "label"],
        ["0", "Who?", "She did.", "not_entailment"],
        {"text": "Who?", "text_pair": "She did.", "label": 1},
    ),
    "rte": (
        ["index", "sentence1", "sentence2", "label"],
        ["0", "A fell.", "A rose.", "entailment"],
        {"text": "A fell.", "text_pair": "A rose.", "label": 0},
    ),
}


def test_there_are_files_for_every_task():
    assert FILES.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_files_are_read_as_glue_distributes_them(name, tmp_path):
    header, line, record = FILES[name]
    lines = [line, line] if header is None else [header, line, line]
    assert glue.read_tsv(TASKS[name], write(tmp_path, lines)) == [record, record]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("rte", [["index", "sentence1", "sentence2"]], "lacks the columns label of"),
        ("rte", FILES["cola"][1:2], "lacks the columns sentence1, sentence2, label"),
        ("cola", FILES["qnli"][:2], "line 1: 'question' is not a label of cola"),
        (
            "rte",
            [FILES["rte"][0], ["0", "A", "B", "yes"]],
            "line 2: 'yes' is not a label",
        ),
        ("rte", [FILES["rte"][0], ["0", "A", "B"]], "line 2 has only 3 cells"),
        (
            "stsb",
            [FILES["stsb"][0], [*"0123", "B", "6"]],
            "'6' is not a score from 0 to",
        ),
        ("stsb", [FILES["stsb"][0], [*"0123", "B", "x"]], "line 2: could not convert"),
        ("rte", [FILES["rte"][0], [""]], "holds no record"),
        ("cola", [[""]], "holds no record"),
        ("rte", [[""]], "lacks the columns"),
    ],
)
def test_a_file_of_another_task_or_a_broken_line_is_an_error(
    name, lines, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        glue.read_tsv(TASKS[name], write(tmp_path, lines))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        glue.read_tsv(TASKS["rte"], tmp_path / "absent.tsv")


def test_only_qqp_has_broken_lines_that_are_left_out(tmp_path):
    header, line, record = FILES["qqp"]
    file = write(tmp_path, [header, line, ["7", "8", "9", "Why"], line])
    assert glue.read_tsv(TASKS["qqp"], file) == [record, record]


@pytest.mark.parametrize(
    ("name", "text", "target"),
    [
        ("cola", 'cola sentence: They "drank the pub.', "unacceptable"),
        ("sst2", "sst2 sentence: hide new secretions ", "positive"),
        (
            "mrpc",
            'mrpc sentence1: He said "yes. sentence2: " No, " he said.',
            "equivalent",
        ),
        ("stsb", "stsb sentence1: A plane. sentence2: An air plane.", "3.8"),
        ("qqp", "qqp question1: Why? question2: How?", "not_duplicate"),
        (
            "mnli",
            "mnli hypothesis: It is wet. premise: It rains.",
            "contradiction",
        ),
        ("qnli", "qnli question: Who? sentence: She did.", "not_entailment"),
        ("rte", "rte sentence1: A fell. sentence2: A rose.", "entailment"),
    ],
)
def test_records_in_t5s_format(name, text, target):
    record = FILES[name][2]
    expected = {"text": text, "target": target, "label": record["label"]}
    assert glue.text_to_text(TASKS[name], [record]) == [expected]


@pytest.mark.parametrize("name", TASKS)
def test_an_answer_is_read_back_into_its_label(name):
    task = TASKS[name]
    labels = range(len(task.classes)) if task.classes else np.arange(26) / 5
    for label in labels:
        text = glue.target(task, label)
        assert glue.answer(task, f" {text} ") == pytest.approx(label)
    assert glue.answer(task, "something else") == -1
    assert glue.answer(task, "") == -1


def test_a_number_is_no_answer_but_to_stsb():
    assert glue.answer(TASKS["rte"], "1") == -1
    assert glue.answer(TASKS["stsb"], "1") == 1
    assert glue.answer(TASKS["stsb"], "5.2") == -1
    assert glue.answer(TASKS["stsb"], "nan") == -1


@pytest.mark.parametrize(
    ("score", "text"),
    [(0.0, "0.0"), (0.09, "0.0"), (0.11, "0.2"), (2.89, "2.8"), (4.95, "5.0")],
)
def test_scores_are_rounded_to_the_nearest_fifth(score, text):
    assert glue.target(TASKS["stsb"], score) == text


def numbered(n):
    return [{"text": f"text {i}", "label": i % 2} for i in range(n)]


def test_the_papers_hold_as_many_training_records_out_as_they_test_on():
    train, validation = numbered(30), numbered(7)
    task = glue.protocol(TASKS["rte"], train, validation)
    assert task.test == validation
    assert (len(task.validation), len(task.train)) == (7, 23)
    found = sorted(record["text"] for record in [*task.train, *task.validation])
    assert found == sorted(record["text"] for record in train)
    assert task.classes == ("entailment", "not_entailment")
    other = glue.protocol(TASKS["rte"], train, validation, seed=1)
    assert other.validation != task.validation
    for few, many in ((7, 7), (7, 0)):
        with pytest.raises(ValueError, match=f"take {many} of {few} training records"):
            glue.protocol(TASKS["rte"], numbered(few), numbered(many))


@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("mnli", "validation", "validation_matched"),
        ("mnli", "train", "train"),
        ("rte", "validation", "validation"),
    ],
)
def test_splits_load_through_hugging_face(monkeypatch, name, split, asked):
    calls = []
    task = TASKS[name]

    def load_dataset(*args, **options):
        calls.append((args, options))
        return [{task.fields[0]: "one", task.fields[1]: "two", "label": 1, "idx": 0}]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    records = glue.load(task, split)
    assert records == [{"text": "one", "text_pair": "two", "label": 1}]
    assert calls == [(("nyu-mll/glue", name), {"split": asked})]


def test_a_split_without_labels_is_an_error():
    with pytest.raises(ValueError, match="no labels for 'test'"):
        glue.load(TASKS["rte"], "test")


def test_a_score_is_the_mean_of_the_official_metrics():
    pytest.importorskip("sklearn", reason="the metrics need it")
    predictions, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    # Two of three, three times; accuracy 3/5.
    assert glue.score(TASKS["rte"], predictions, labels) == pytest.approx(0.6)
    expected = (2 / 3 + 0.6) / 2
    assert glue.score(TASKS["mrpc"], predictions, labels) == pytest.approx(expected)
    assert glue.score(TASKS["qqp"], predictions, labels) == pytest.approx(expected)
    # (tp tn - fp fn) / sqrt(...) = (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    assert glue.score(TASKS["cola"], predictions, labels) == pytest.approx(1 / 6)
    scores, truth = np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, 5.0])
    expected = (np.corrcoef(scores, truth)[0, 1] + 1) / 2
    assert glue.score(TASKS["stsb"], scores, truth) == pytest.approx(expected)
    assert expected < 0.999
