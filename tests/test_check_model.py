"""The check of a model: what is fine, what is not, and what to fetch."""

import json

import numpy as np
import pytest

from experiments import check_model
from experiments.common.vision import model_checks
from jaxarith import hub
from jaxarith.models import clip


def config_of(tmp_path, model, **changes):
    given = {"model": str(model), "out": tmp_path / "out", "source": "small"}
    given |= {"tasks": ("uci_digits", "inverted_digits"), "control": "none"}
    given |= {"samples": 24, "batch_size": 4, "workers": 0, "mesh": "data=1"}
    return check_model.Config(**given | changes)


def by_name(tmp_path):
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def test_the_tiny_clip_passes(shallow_folder, tmp_path):
    pytest.importorskip("torch")
    found = check_model.main(config_of(tmp_path, shallow_folder))
    assert found["failed"] == []
    rows = by_name(tmp_path)
    assert [row["state"] for row in rows.values()] == [model_checks.OK] * len(rows)
    ours = [rows[f"zero-shot, {x}"]["ours"] for x in ("uci_digits", "inverted_digits")]
    assert rows["zero-shot, mean of 2"]["ours"] == pytest.approx(np.mean(ours))
    assert "Nothing failed." in (tmp_path / "out" / "report.md").read_text()


def test_missing_data_is_named_and_is_no_failure(shallow_folder, tmp_path, monkeypatch):
    fine = model_checks.Check("other", model_checks.OK)
    monkeypatch.setattr(model_checks, "parity", lambda *_: fine)
    monkeypatch.setattr(model_checks, "step", lambda *_: fine)
    config = config_of(
        tmp_path, shallow_folder, source="folder", tasks=("dtd",), data_dir=tmp_path
    )
    check_model.main(config)
    row = by_name(tmp_path)["zero-shot, dtd"]
    assert row["state"] == model_checks.NOT_POSSIBLE
    assert "to prepare: put its images into" in row["details"]


def test_without_weights_it_says_what_to_fetch(tmp_path, monkeypatch):
    def load(model):
        raise FileNotFoundError("it could not be downloaded")

    monkeypatch.setattr(clip, "load", load)
    with pytest.raises(SystemExit) as stop:
        check_model.main(config_of(tmp_path, "openai/clip-vit-base-patch32"))
    assert stop.value.code == 1
    [row] = by_name(tmp_path).values()
    command = "hf download openai/clip-vit-base-patch32 --local-dir clip-vit-base-pa"
    assert row["state"] == model_checks.FAILED and command in row["details"]


def test_a_checkpoint_with_a_tensor_too_few_fails(shallow_folder, tmp_path):
    model = clip.load(shallow_folder)
    params = {k: v for k, v in model.params.items() if k != "text_projection"}
    folder = tmp_path / "broken"
    hub.save(folder, params, hub.read_json(model.folder), copy_from=model.folder)
    with pytest.raises(SystemExit):
        check_model.main(config_of(tmp_path, folder))
    [row] = by_name(tmp_path).values()
    assert row["state"] == model_checks.FAILED and "text_projection" in row["details"]


def test_an_accuracy_far_from_the_published_one_fails(shallow_folder, tmp_path):
    config = config_of(tmp_path, shallow_folder, tasks=("uci_digits",), samples=None)
    checkpoint = clip.load(shallow_folder)
    states = []
    for theirs in (None, 150.0):
        known = {} if theirs is None else {"uci_digits": theirs}
        [(check, task)] = model_checks.zero_shot(config, checkpoint, known)
        assert task is not None and check.published == theirs
        states.append(check.state)
    assert states == [model_checks.OK, model_checks.FAILED]


def test_the_published_rows_are_those_of_the_awd_paper():
    means = {"ViT-B-32": 48.0, "ViT-B-16": 55.0, "ViT-L-14": 64.5}
    for model, mean in means.items():
        values = [x for n, x in check_model.PUBLISHED[model].items() if n != "imagenet"]
        assert len(values) == 8 and np.mean(values) == pytest.approx(mean, abs=0.1)
