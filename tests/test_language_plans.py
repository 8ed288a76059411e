"""`--plan` of the scripts on texts: models by their sizes, tasks by their numbers."""

import itertools
import json
import math
from typing import Any

import jax
import numpy as np
import pytest

from experiments import detoxify
from experiments.awd import table3_glue as awd_glue
from experiments.bases import figure7_seventy_tasks, table8_twelve_tasks
from experiments.bases import table16_prompt_robustness as prompt_robustness
from experiments.common import planning
from experiments.common.language import architectures, planned
from experiments.editing import (
    figure13_real_toxicity_prompts,
    figure18_nlp_pairs,
    table2_detoxification,
    table3_external_vectors,
    table4_analogies,
)
from experiments.tau_jp import table3_glue, table4_detoxification
from experiments.tau_jp.table3_glue import TASKS
from jaxarith import tree
from jaxarith.data import glue
from jaxarith.models import bert, gpt2, t5

_ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_ENCODER |= {"intermediate_size": 32, "vocab_size": 50}
CONFIGS = {
    "t5": {
        **{"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2},
        **{"num_layers": 1, "vocab_size": 50},
    },
    "gpt2": {
        **{"model_type": "gpt2", "n_positions": 64, "n_embd": 16, "n_layer": 1},
        **{"n_head": 2, "vocab_size": 50},
    },
    "roberta": {"model_type": "roberta", **_ENCODER, "max_position_embeddings": 66},
    "bert": {"model_type": "bert", **_ENCODER, "max_position_embeddings": 64},
}


@pytest.fixture
def given(tmp_path):
    """Options that every script has, and the folder of a model by its kind."""

    def folder(kind):
        place = tmp_path / "models" / kind
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(CONFIGS[kind]))
        return str(place)

    return folder, {"plan": 1, "out": tmp_path / "out"}, tmp_path / "bank"


def noted(script, **options):
    """What a script notes, without the FLOPs of a step."""
    record = planning.Recorder(1, "")
    script.plan(script.Config(**options), record)
    return record


def steps(record):
    return sum(len(one.names) * one.recipe.steps for one in record.trainings)


def step_flops(full, loss, batch_size, constants=None):
    """XLA's FLOPs of the loss and its gradient, and the number of parameters."""

    def total(params, batch):
        return loss(
            full.apply_fn(params, *(batch[n] for n in full.inputs)), batch, constants
        )

    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype)
        for name, x in full.sample.items()
    }
    lowered = jax.jit(jax.value_and_grad(total)).lower(full.params_0, batch)
    counted: Any = lowered.cost_analysis()
    return counted["flops"], tree.size(full.params_0)


def assert_flops(row, training):
    """A step is the gradient, and AdamW's few FLOPs of every parameter."""
    constants = training.constants and jax.tree.map(lambda x: x[0], training.constants)
    flops, parameters = step_flops(
        training.full, training.loss, training.recipe.batch_size, constants
    )
    optimizer = 1e12 * row["TFLOP a step"] - flops
    assert 5 * parameters < optimizer < 40 * parameters


# T5.


def test_glue_of_t5(given):
    folder, options, bank = given
    options |= {"model": folder("t5"), "bank": bank, "steps": 7, "max_length": 12}
    record = noted(table3_glue, **options, coefs=(0.5, 1.0))
    assert [len(one.names) for one in record.trainings] == [4, 4, 4]
    texts = sum(planned.GLUE[name][1] for name in table3_glue.TASKS)
    tokens, ranks = record.passes.values()
    # Before; own models and sums of three methods, 1 + 3 + 3 passes; and TIES.
    assert ranks == texts * (1 + 7 + 8)
    assert tokens == ranks + texts * (7 + 2 * 8)


def test_a_step_of_t5(given):
    folder, options, bank = given
    options |= {"model": folder("t5"), "bank": bank, "steps": 7, "max_length": 12}
    record = noted(table3_glue, **options)
    for method, name in itertools.product(("linear", "tau_jp_cyclic"), TASKS):
        place = bank / "t5" / method
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.safetensors").touch()
    config = table3_glue.Config(**options, plan_memory=0)
    [row] = planning.run(table3_glue.main, config)["rows"]
    assert (row["to train"], row["steps"], row["in the bank"]) == (4, 28, 0)
    assert "GB a device" not in row
    assert_flops(row, record.trainings[0])
    [*_, penalised] = record.trainings
    assert penalised.full.penalty_mask in penalised.full.sample


def test_pairs_of_t5s_train_nothing(given):
    folder, options, _ = given
    own = {"model": folder("t5"), "tasks": ("imdb", "race"), "coefs": (0.5, 1.0)}
    record = noted(figure18_nlp_pairs, **options, **own, samples=10)
    assert not record.trainings
    # The own model on both parts; the pair at two coefficients, and at the best.
    assert set(record.passes.values()) == {10 * (2 + 3)}


def test_vectors_of_others_and_analogies(given):
    folder, options, bank = given
    options |= {"bank": bank, "coefs": (0.5, 1.0)}
    own = options | {"model": folder("t5"), "seeds": (0,), "external": ("a", "b")}
    record = noted(table3_external_vectors, **own)
    samples = [planned.glue_parts(name)[0] for name in table3_external_vectors.TASKS]
    assert steps(record) == sum(math.ceil(5 * count / 32) for count in samples)
    texts = sum(planned.GLUE[name][1] for name in table3_external_vectors.TASKS)
    assert list(record.passes.values()) == [texts * (2 * 2 + 1 + 3)]
    own = options | {"models": (folder("t5"),), "train_samples": 160}
    record = noted(table4_analogies, **own, validation_samples=5, test_samples=3)
    assert steps(record) == 4 * 160 / 16
    assert list(record.passes.values()) == [2 * (4 * 5 + 3 * 3)]


# RoBERTa.


def test_glue_of_roberta_and_its_bank(given, tmp_path):
    folder, options, bank = given
    own = {"models": (folder("roberta"),), "tasks": ("rte", "mrpc"), "max_length": 12}
    place = bank / "roberta" / "classifier"
    place.mkdir(parents=True)
    (place / "rte.safetensors").touch()
    config = awd_glue.Config(**options, **own, bank=bank, plan_memory=0)
    [row] = planning.run(awd_glue.main, config)["rows"]
    assert (row["to train"], row["in the bank"]) == (1, 1)
    assert row["steps"] == 10 * math.ceil((3668 - 408) / 64)
    record = noted(awd_glue, **options, **own, bank=bank)
    assert_flops(row, record.trainings[0])
    plain = noted(awd_glue, **options, **own, bank=bank, beyond_paper=False)
    # Own scores, eight λ of four merges and of five α; eight rows, and Figure 2.
    expected = (277 + 408) * (1 + 8 * (4 + 5) + 8 + 2)
    assert list(plain.passes.values()) == [expected]


def test_prompted_roberta(given):
    folder, options, bank = given
    own = {"model": folder("roberta"), "bank": bank, "max_length": 12, "shots": 8}
    config = prompt_robustness.Config(**options, **own, plan_memory=1e-6)
    with pytest.raises(ValueError, match="on 2 devices, --tasks-together 1"):
        planning.run(prompt_robustness.main, config)
    record = noted(prompt_robustness, **options, **own)
    three, two = record.trainings  # of three classes, and of two
    assert (three.names, two.names) == (("MNLI",), ("CR", "SST2", "SST2Adv"))
    assert (three.recipe.steps, two.recipe.steps) == (10 * 24 / 4, 10 * 16 / 4)
    assert not record.passes


def test_seventy_and_twelve_prompted_tasks(given):
    folder, options, bank = given
    own = {"model": folder("roberta"), "bank": bank, "max_length": 12}
    own |= {"samples": 10, "shots": 8}
    tasks = ("CB", "CR", "RTE")
    record = noted(figure7_seventy_tasks, **options, **own, tasks=tasks, ks=(1, 2, 70))
    # Before and own models; k of 1, of 2 with five partitions, and of 3.
    assert list(record.passes.values()) == [3 * 10 * (2 + 1 + 6 + 1)]
    record = noted(table8_twelve_tasks, **options, **own, tasks=("CR", "RTE"))
    trained = 2 * 8 * 2
    fitted = (9 + 1 + 3 * 10) * trained + 3 * 16 * 500 * 2
    expected = (8 + 4) * 20 + 4 * 10 * trained + fitted
    assert list(record.passes.values()) == [expected]
    with pytest.raises(ValueError, match="only the tasks of the paper's list, not a"):
        noted(table8_twelve_tasks, **options, **own, tasks=("a=b.csv", "CR"))


def test_test_parts_that_are_not_known_are_not_counted(given):
    folder, options, bank = given
    own = {"model": folder("roberta"), "bank": bank, "max_length": 12}
    record = noted(figure7_seventy_tasks, **options, **own, tasks=("CB", "CR", "RTE"))
    assert any("1 of 3 tasks have unknown sizes" in note for note in record.notes)


# GPT-2.


def test_toxic_text_of_gpt2(given, tmp_path):
    folder, options, bank = given
    comments = tmp_path / "comments.jsonl"
    rows = [{"text": "x", "toxicity": 0.9 if i < 64 else 0.1} for i in range(80)]
    comments.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = {"model": folder("gpt2"), "classifier": folder("bert"), "bank": bank}
    own |= {"comments": comments, "max_length": 12, "stride": 64, "coefs": (0.5, 1.0)}
    own |= {"samples": 10, "max_new_tokens": 24, "plan_memory": 0}
    record = noted(table4_detoxification, **options, **own)
    found = {one.recipe.steps for one in record.trainings}
    assert found == {int(2.5 * (64 // 16))}
    windows, texts, scores = record.passes.values()
    # Ordinary models: two rows, TIES and two searches; three passes of the others.
    assert windows == math.ceil(287644 / 64) * (3 + 2 * 2 + 3 * (2 + 2 * 2))
    assert (texts, scores) == (10 * (3 + 3 * 2), 10 * 5)
    for method in ("linear", "nonlinear"):
        place = bank / "gpt2" / method
        place.mkdir(parents=True)
        (place / "toxic.safetensors").touch()
    config = table4_detoxification.Config(**options, **own)
    [row] = planning.run(table4_detoxification.main, config)["rows"]
    ordinary = record.trainings[0]
    flops, _ = step_flops(ordinary.full, ordinary.loss, 16)
    # Tangent products cost more than an ordinary gradient, and the penalty has a
    # quarter of the samples.
    assert 1.3 < 1e12 * row["TFLOP a step"] / flops < 3


def test_gpt2s_without_comments_and_memory_that_does_not_suffice(given):
    folder, options, bank = given
    own = {"models": (folder("gpt2"),), "classifier": folder("bert"), "bank": bank}
    own |= {"max_length": 12, "plan_memory": 1e-6}
    config = table2_detoxification.Config(**options, **own)
    with pytest.raises(ValueError, match="helps: --micro-batches 2, --mesh fsdp=2"):
        planning.run(table2_detoxification.main, config)
    record = noted(table2_detoxification, **options, **own)
    assert [len(one.names) for one in record.trainings] == 3 * [1]
    assert any("20000 toxic comments are assumed" in note for note in record.notes)
    record = noted(figure13_real_toxicity_prompts, **options, **own, generations=2)
    assert record.passes["gpt2, 84 tokens"] == 11 * (1199 + 1000) * 2


def test_detoxify(given, tmp_path):
    folder, options, _ = given
    own = {"model": folder("gpt2"), "classifier": folder("bert"), "texts": 64}
    own |= {"toxic": tmp_path / "none.jsonl", "perplexity_text": tmp_path / "none.txt"}
    own |= {"max_length": 12, "samples": 10, "perplexity_tokens": 64}
    record = noted(detoxify, **options, **own, linearized=True)
    [training] = record.trainings
    assert training.recipe.linearized and training.recipe.steps == 5 * 64 / 32
    # Eleven coefficients, the fine-tuned model and a random vector, in three passes.
    windows, texts, scores = record.passes.values()
    assert (windows, texts, scores) == (3 * 13, 3 * 130, 130)


# Sizes.


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("google/flan-t5-small", 77.0),
        ("google-t5/t5-large", 737.7),
        ("openai-community/gpt2-large", 774.0),
        ("FacebookAI/roberta-large", 355.4),
        ("unitary/toxic-bert", 109.5),
    ],
)
def test_models_of_the_papers_have_their_parameters(model, millions):
    kind = architectures.SIZES[model]["model_type"]
    if kind == "t5":
        layout = t5.layout(architectures.t5_of(model))
    elif kind == "gpt2":
        layout = gpt2.layout(architectures.gpt2_of(model))
    else:
        layout = bert.layout(architectures.bert_of(model), "classifier")
    np.testing.assert_allclose(tree.size(layout) / 1e6, millions, atol=0.06)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="nobody/model has no config.json"):
        architectures.gpt2_of("nobody/model")


def test_all_tasks_of_glue_have_known_sizes():
    assert planned.GLUE.keys() == glue.TASKS.keys()
    assert planned.glue_parts("rte") == (2213, 277)
