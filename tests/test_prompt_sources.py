"""Where the prompted tasks lie, and how their records are read."""

import sys
import types

import pytest

from jaxarith.data import prompt_sources, prompts

SOURCES = prompt_sources.sources()


def stub_hub(monkeypatch, tables):
    """A module `datasets` with these tables by (id, config, split)."""

    class Table(list):
        @property
        def column_names(self):
            return list(super().__getitem__(0))

        def __getitem__(self, key):
            if isinstance(key, str):
                return [row[key] for row in self]
            return super().__getitem__(key)

    def load_dataset(name, config, *, split):
        return Table(tables[name, config, split])

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_rows_of_the_hub_become_records(monkeypatch):
    arc = {"question": "Which?", "answerKey": "2", "choices": {"text": ["x", "y"]}}
    snli = [
        {"premise": "A.", "hypothesis": "B.", "label": label} for label in (2, -1, 0)
    ]
    logic = {"major_premise": ["All a.", "Some b."], "minor_premise": "C."}
    logic |= {"conclusion": "D.", "label": 1}
    stub_hub(
        monkeypatch,
        {
            ("allenai/ai2_arc", "ARC-Easy", "train"): [arc],
            ("stanfordnlp/snli", None, "test"): snli,
            ("baber/logiqa2", "logiqa2_nli", "train"): [logic],
            ("andythetechnerd03/AI-human-text", None, "test"): [
                {"text": "Mine.", "generated": 1.0}
            ],
        },
    )
    rows = prompt_sources.load(SOURCES["ARC Easy"], "train")
    assert rows.labels == ["1"]
    filled = prompts.fill(SOURCES["ARC Easy"].prompt, rows.record(0), "<mask>")
    assert filled == "Which? A: x B: y C:  D:  E:  Answer: <mask>"
    rows = prompt_sources.load(SOURCES["SNLI"], "test")
    assert rows.labels == ["not_entailment", None, "entailment"]
    assert rows.record(2) == {"text": "A.", "text_pair": "B."}
    rows = prompt_sources.load(SOURCES["LogiQA2.0 NLI"], "train")
    assert rows.labels == ["entailment"]
    assert rows.record(0) == {"text": "All a. Some b. C.", "text_pair": "D."}
    rows = prompt_sources.load(SOURCES["AI-Human-Text"], "test")
    assert rows.labels == ["machine-generated"]


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A dataset that is a script, and the hub's conversion of it in files."""
    datasets = pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    script = tmp_path / "logiqa2" / "logiqa2.py"
    script.parent.mkdir()
    script.write_text("raise AssertionError('a script ran')")

    def write(config, split, conclusions):
        folder = tmp_path / "converted" / config / split
        folder.mkdir(parents=True)
        for n, conclusion in enumerate(conclusions):  # several files, as of large sets
            row = {"major_premise": [["All a.", "Some b."]], "minor_premise": ["C."]}
            row |= {"conclusion": [conclusion], "label": [n % 2]}
            parquet.write_table(pa.table(row), folder / f"{n:04}.parquet")

    for config in ("logiqa2_nli", "logiqa2_zh"):
        write(config, "train", [f"{config} 0", f"{config} 1"])
        write(config, "validation", [f"{config} held out"])
    monkeypatch.setattr(prompt_sources, "CONVERTED", str(tmp_path / "converted"))
    return SOURCES["LogiQA2.0 NLI"]._replace(dataset=str(script.parent))


def test_of_a_dataset_that_is_a_script_the_hubs_conversion_is_read(converted):
    rows = prompt_sources.load(converted, "train")
    assert rows.labels == ["not_entailment", "entailment"]
    expected = {"text": "All a. Some b. C.", "text_pair": "logiqa2_nli 1"}
    assert rows.record(1) == expected
    rows = prompt_sources.load(converted, "test")
    assert rows.record(0)["text_pair"] == "logiqa2_nli held out"


def test_a_split_that_was_not_converted_is_an_error_with_those_that_were(converted):
    listed = "logiqa2_nli/train, logiqa2_nli/validation, logiqa2_zh/train"
    with pytest.raises(ValueError, match=f"no logiqa2_nli/test; it has {listed}"):
        prompt_sources.load(converted._replace(test="test"), "test")
    with pytest.raises(ValueError, match="no default/train; it has logiqa2_nli/train"):
        prompt_sources.load(converted._replace(config=None), "train")


def test_a_dataset_without_its_columns_is_an_error(monkeypatch):
    stub_hub(monkeypatch, {("stanfordnlp/snli", None, "train"): [{"premise": "A"}]})
    with pytest.raises(ValueError, match="no column hypothesis, label. It has premise"):
        prompt_sources.load(SOURCES["SNLI"], "train")


def test_files_of_lm_bff_have_no_header(tmp_path):
    (tmp_path / "original" / "cr").mkdir(parents=True)
    file = tmp_path / "original" / "cr" / "train.csv"
    file.write_text('1,"good, and cheap"\n0,bad\n')
    rows = prompt_sources.load(SOURCES["CR"], "train", tmp_path)
    assert rows.labels == ["positive", "negative"]
    assert rows.record(0) == {"text": "good, and cheap"}
