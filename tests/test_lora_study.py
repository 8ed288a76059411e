"""The LoRA study in its smoke form, its tasks, and the count of FLOPs."""

import json

import jax
import numpy as np
import pytest
from smoke import plain_numbers

from experiments import lora_study
from experiments.bench import encoders, lora_flops
from experiments.common.language import docstrings
from jaxarith import hub
from jaxarith.hub import folders, lora


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pytest.importorskip("transformers", reason="makes the tokenizer")
    out = tmp_path_factory.mktemp("lora") / "study"
    return out, lora_study.main(lora_study.Config(smoke=True, out=out, rank=2))


def test_the_report_has_a_row_for_every_model_and_merge(study):
    out, found = study
    assert json.loads((out / "report.json").read_text()) == found
    numbers = plain_numbers(found)
    assert np.isfinite(numbers).all() and len(set(numbers)) > 5
    models = [row["model"] for row in found["rows"]]
    names = ("ordinary", "linearised", "linearised, run as a network")
    assert models == ["pre-trained", *(name for name in names for _ in range(3))]
    assert (out / "report.md").read_text().startswith("# LoRA")
    assert (out / "coefficients.png").stat().st_size > 5000
    for row in found["rows"]:
        mean = np.mean([row[name] for name in ("library", "kind", "order")])
        assert row["absolute"] == pytest.approx(mean)


def test_the_adapters_fit_the_model(study):
    out, _ = study
    _, tensors = folders.open_tensors(out / "model")
    for kind in ("ordinary", "linearised"):
        for task in ("library", "kind", "order"):
            found = lora.read_adapter(out / "adapters" / kind / task, tensors)
            assert len(found.deltas) == 6
            assert all(np.abs(x.read()).max() > 0 for x in found.deltas.values())
            config = hub.read_json(
                out / "adapters" / kind / task, "adapter_config.json"
            )
            assert config["r"] == 2  # the start of B is zero


def test_peft_agrees(study):
    pytest.importorskip("torch", reason="PyTorch, under PEFT, is missing")
    pytest.importorskip("peft", reason="the oracle: pip install peft==0.21.2")
    for found in study[1]["peft"].values():
        assert found["apart"] < 1e-5 < 1e-2 < found["moved"]


def test_the_tasks_share_no_text_across_their_parts():
    tasks = docstrings.tasks(80, 40, 40, files=20)
    assert [task.name for task in tasks] == ["library", "kind", "order"]
    words = {
        part: {
            tuple(sorted(record["text"].lower().removesuffix(".").split()))
            for task in tasks
            for record in getattr(task, part)
        }
        for part in ("train", "validation", "test")
    }
    assert not words["train"] & (words["validation"] | words["test"])
    for task in tasks:
        for records in (task.train, task.validation, task.test):
            counts = np.bincount([record["label"] for record in records])
            assert len(set(counts)) == 1 and len(counts) == len(task.classes)


def test_linearised_lora_counts_the_products_of_an_ordinary_step(tmp_path):
    """On two blocks; the whole ViT-B/32 is the script's default."""
    config = lora_flops.Config(tmp_path, layers=2, batch=2, ranks=(8,))
    encoder = encoders.encoder(config.model, config.layers)
    data = encoder.make_inputs(np.random.default_rng(0), config.batch)
    data += np.zeros(2, np.int32), np.ones((5, 512), np.float32)
    steps = lora_flops.steps(config, encoder)

    def flops(row, linearized):
        step, *args = steps[row, linearized]
        return jax.jit(step).lower(*args, *data).compile().cost_analysis()["flops"]

    ordinary = flops("all weights", False)
    assert flops("A, B of rank 8, all linear layers", True) < 1.05 * ordinary
    assert flops("A, B of rank 8, all linear layers", False) < 0.7 * ordinary


def test_the_report_of_flops_has_all_steps(tmp_path):
    config = lora_flops.Config(tmp_path, model="tiny", layers=1, batch=2, ranks=(2,))
    found = lora_flops.main(config)
    assert json.loads((tmp_path / "report.json").read_text()) == found
    assert len(found["rows"]) == 10
    assert found["rows"][0]["over ordinary"] == 1
    assert found["rows"][1]["over ordinary"] > 1.2
