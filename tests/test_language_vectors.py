"""A vector of text is the same whichever others are missing or trained beside it.

`test_training` shows it of `common.training`; here of what its users ask it for.
"""

import dataclasses

import numpy as np
import pytest

from experiments.common import runs, training
from experiments.common.language import (
    detoxification,
    gpt2,
    prompted,
    roberta_glue,
    t5_glue,
    text_to_text,
)
from experiments.tau_jp import table3_glue, table4_detoxification
from jaxarith import sharding, train

# What a script trains: by its network, the vectors that it asks for at a time.
Trained = list[tuple[training.Network, list[training.Wanted]]]


@pytest.fixture(autouse=True, scope="module")
def _packages():
    pytest.importorskip("transformers", reason="makes the tokenizers")
    pytest.importorskip("sklearn", reason="scripts on GLUE measure with it")


def options(kind, place, name, **fields):
    return kind(out=place / name, bank=place / "bank", smoke=True, **fields)


def prompted_roberta(place):
    for name, tasks in (("all", ("SST2", "CR", "QNLI")), ("two", ("QNLI", "SST2"))):
        config = prompted.smoke(options(prompted.Options, place, name), tasks)
        setup = prompted.load(config)
        yield [(prompted.network(setup), prompted.wanted(setup))]


def classifying_roberta(place):
    for name, tasks in (("all", ("mrpc", "stsb", "mnli")), ("two", ("mnli", "mrpc"))):
        config = roberta_glue.smoke(options(roberta_glue.Options, place, name))
        [setup] = roberta_glue.setups(dataclasses.replace(config, tasks=tasks))
        yield [(roberta_glue.network(setup), roberta_glue.wanted(setup))]


def t5_of_glue(place):
    study = t5_glue.start(options(table3_glue.Config, place, "glue"))
    method = "tau_jp_cyclic"
    network, wanted = t5_glue.trainer(study, method), study.wanted[method]
    yield [(network, wanted)]
    yield [(network, [wanted[3], wanted[1]])]  # the others are in the bank


def t5_that_is_edited(place):
    config = options(text_to_text.Options, place, "t5", max_length=8)
    base = text_to_text.load(config, sharding.make_mesh("data=1"), "tiny_t5")
    recipe = train.TrainConfig(steps=3, warmup_steps=0, batch_size=2)
    records = [
        {"text": text, "target": "positive"}
        for text in ("a good film", "the book is bad", "a cat", "good dog")
    ]
    wanted = [
        text_to_text.wanted(
            base, name, text_to_text.training_source(base, rows, 2), recipe
        )
        for name, rows in (("one", records), ("two", records[::-1]))
    ]
    yield [(text_to_text.network(base), wanted)]
    yield [(text_to_text.network(base), wanted[1:])]


def gpt2_of_the_editing_paper(place):
    for name, kinds in (("all", detoxification.KINDS), ("one", ("toxic_ascent",))):
        config = options(detoxification.EditingOptions, place, name)
        [study] = detoxification.start(
            detoxification.smoke(config), kinds, gpt2.Sampling(max_new_tokens=4)
        )
        yield [(study.networks[kind], [study.wanted[kind]]) for kind in kinds]


def gpt2_of_the_tau_jp_paper(place):
    config = options(table4_detoxification.Config, place, "tau_jp")
    study = table4_detoxification.start(config)
    every = [(study.networks[m], [study.wanted[m]]) for m in study.wanted]
    yield every
    yield every[2:]


def first_and_last_batch(trained: Trained, place, monkeypatch):
    """By its file, of every vector that is missing."""
    seen = {}

    class Stop(Exception):
        """Training would begin."""

    def spy(apply_fn, params_0, loss, batches, recipe, *, names, **others):
        for i, one in enumerate(group):
            assert one.name == names[i]
            found = [batches[0], batches[len(batches) - 1]]
            found = [batch | batch.get("penalty", {}) for batch in found]
            seen[one.file] = [
                {k: leaf[i] for k, leaf in batch.items() if k != "penalty"}
                for batch in found
            ]
        raise Stop

    monkeypatch.setattr(train, "fine_tune", spy)
    config = runs.Options(out=place / "out")
    for network, wanted in trained:
        [group] = training.alike(wanted)
        with pytest.raises(Stop):
            training.vectors(config, network, wanted)
    return seen


@pytest.mark.parametrize(
    "user",
    [
        prompted_roberta,
        classifying_roberta,
        t5_of_glue,
        t5_that_is_edited,
        gpt2_of_the_editing_paper,
        gpt2_of_the_tau_jp_paper,
    ],
)
def test_samples_and_identity_do_not_depend_on_the_others(user, tmp_path, monkeypatch):
    every, some = user(tmp_path)
    identities, chosen = (
        {one.file: training.identity(one) for _, wanted in part for one in wanted}
        for part in (every, some)
    )
    assert 0 < len(chosen) < len(identities)
    assert chosen == {file: identities[file] for file in chosen}
    batches = first_and_last_batch(every, tmp_path, monkeypatch)
    own = first_and_last_batch(some, tmp_path, monkeypatch)
    for file, found in own.items():
        for batch, expected in zip(found, batches[file], strict=True):
            assert batch.keys() == expected.keys()
            for name, leaf in batch.items():
                np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    # Not the same for all: what is compared tells tasks and steps apart.
    ids = [batch["input_ids"].tobytes() for pair in batches.values() for batch in pair]
    assert len(set(ids)) >= len(batches)


def test_gradient_ascent_sees_the_samples_of_descent(tmp_path, monkeypatch):
    every, _ = gpt2_of_the_editing_paper(tmp_path)
    batches = first_and_last_batch(every, tmp_path, monkeypatch)
    toxic, ascent = (
        next(v for file, v in batches.items() if file.stem == kind)
        for kind in ("toxic", "toxic_ascent")
    )
    for one, other in zip(toxic, ascent, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
