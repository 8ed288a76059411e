"""RoBERTa classifiers from outside, in place of those that are trained on GLUE."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.awd import table3_glue
from experiments.common import bank, runs
from experiments.common.language import roberta_glue, tiny_text
from jaxarith import hub, task_vectors, tree
from jaxarith.models import bert

CLASSES = {
    "mrpc": ("equivalent", "not_equivalent"),  # in the other order than GLUE's
    "stsb": ("LABEL_0",),
    "mnli": ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"),
}


@pytest.fixture(autouse=True, scope="module")
def _transformers():
    pytest.importorskip("transformers", reason="makes the tokenizers")
    pytest.importorskip("sklearn", reason="measures F1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return bert.load(
        tiny_text.write_roberta(tmp_path_factory.mktemp("base")), head=None
    )


def write(folder, base, classes, scale=0.01, **changes):
    """A classifier of these classes, near the pre-trained model."""
    raw = hub.read_json(base.folder) | {
        "architectures": ["RobertaForSequenceClassification"],
        "id2label": {str(i): name for i, name in enumerate(classes)},
    }
    raw |= changes
    config = dataclasses.replace(base.config, num_labels=len(classes))
    params = roberta_glue.with_head(config, base.params, seed=5)
    moved = {
        path: leaf + scale * np.random.default_rng(i).normal(size=np.shape(leaf))
        for i, (path, leaf) in enumerate(tree.flatten(params).items())
    }
    params = tree.unflatten({p: np.asarray(x, np.float32) for p, x in moved.items()})
    hub.save(folder, params, raw)
    return config, params


def config_of(tmp_path, given):
    specs = tuple(f"{name}={folder}" for name, folder in given.items())
    config = table3_glue.Config(
        checkpoints=specs,
        smoke=True,
        models=(roberta_glue.TINY,),
        bank=tmp_path / "bank",
        out=tmp_path / "out",
    )
    return roberta_glue.smoke(config)


def test_classifiers_keep_their_outputs_in_glues_order(tmp_path, base):
    given = {name: tmp_path / name for name in CLASSES}
    written = {
        name: write(tmp_path / name, base, classes) for name, classes in CLASSES.items()
    }
    config = config_of(tmp_path, given)
    [setup] = roberta_glue.setups(config)
    taus = roberta_glue.vectors(setup)  # trains nothing
    assert not list((tmp_path / "out").rglob("*.jsonl"))
    of_glue = {"mrpc": [1, 0], "stsb": [0], "mnli": [2, 1, 0]}
    apply = jax.jit(setup.apply_fn)
    for name, tau in taus.items():
        batch = setup.tasks[name].parts["test"][0]
        inputs = [batch[field] for field in roberta_glue.INPUTS]
        own_config, params = written[name]
        expected = np.asarray(jax.jit(bert.classifier(own_config))(params, *inputs))
        found = np.asarray(apply(task_vectors.apply(setup.params_0, tau), *inputs))
        expected = expected[:, of_glue[name]]
        found = found[:, : expected.shape[1]]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert np.ptp(expected) > 1e-3
    line = (
        "From outside, not trained here: mrpc, stsb, mnli (tiny_roberta, classifier)."
    )
    assert runs.external(config.out) == line


def test_classes_without_names_are_taken_in_glues_order(tmp_path, base, capsys):
    write(tmp_path / "rte", base, ("LABEL_0", "LABEL_1"))
    config = config_of(tmp_path, {"mrpc": tmp_path / "rte"})
    [*_] = roberta_glue.setups(config)
    assert "does not name its classes" in capsys.readouterr().out
    file = bank.vector_file(tmp_path / "bank", roberta_glue.TINY, "classifier", "mrpc")
    assert bank.is_external(file)


@pytest.mark.parametrize(
    ("classes", "changes", "said"),
    [
        (("a", "b", "c"), {}, "has 3 outputs, and mrpc needs 2"),
        (("good", "bad"), {}, "has the classes good, bad, and mrpc has"),
        (("LABEL_0", "LABEL_1"), {"num_attention_heads": 1}, "no fine-tuned copy"),
        (("LABEL_0", "LABEL_1"), {"scale": 50.0}, "no fine-tuned copy of the other"),
    ],
)
def test_what_is_no_copy_for_the_task_is_refused(
    tmp_path, base, classes, changes, said
):
    write(tmp_path / "other", base, classes, **changes)
    config = config_of(tmp_path, {"mrpc": tmp_path / "other"})
    with pytest.raises(ValueError, match=said):
        [*_] = roberta_glue.setups(config)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoints": ("cats=x",)}, "expected TASK=CHECKPOINT"),
        ({"checkpoints": ("mrpc",)}, "expected TASK=CHECKPOINT"),
        ({"checkpoints": ("mrpc=x",), "models": ("a", "b")}, "expected one: the model"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(tmp_path, change, said):
    config = dataclasses.replace(config_of(tmp_path, {}), **change)
    with pytest.raises(ValueError, match=said):
        [*_] = roberta_glue.setups(config)
