"""Training on data of one's own: forms of samples, and mistakes that are named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

from jaxarith import train
from jaxarith.data import pipeline

CONFIG = train.TrainConfig(steps=3, batch_size=4)
X = np.random.default_rng(0).normal(size=(20, 3)).astype("f4")
Y = np.arange(20) % 2
ROWS = [{"image": x, "label": y} for x, y in zip(X, Y, strict=True)]


def run(sources, *, names=("a",), constants=None, config=CONFIG, **options):
    batches = train.task_batches(sources, config, **options)
    return train.fine_tune(
        lambda params, x: x @ params["w"],
        {"w": jnp.ones((3, 2))},
        lambda outputs, batch, _: jnp.mean(outputs[:, 0] * batch["label"]),
        batches,
        config,
        names=names,
        constants=constants,
    )


@pytest.mark.parametrize("steps", [1, 9, 100, 200, 2000])
def test_warm_up_is_a_tenth_of_the_steps_unless_it_is_given(steps):
    config = train.TrainConfig(steps=steps)
    assert config.warmup == steps // 10
    explicit = train.TrainConfig(steps=steps, warmup_steps=steps // 10)
    rates = [jax.vmap(train.schedule(c))(jnp.arange(steps)) for c in (config, explicit)]
    np.testing.assert_array_equal(*rates)


def test_the_presets_of_the_papers_have_their_warm_up():
    assert (train.paper().steps, train.paper().warmup_steps) == (2000, 200)
    assert train.code(7330, 35).warmup_steps == 500


@pytest.mark.parametrize(
    "convert", [np.asarray, jnp.asarray, list], ids=["numpy", "jax", "list"]
)
def test_a_dict_of_arrays_trains_as_its_rows_do(convert):
    columns = {"image": convert(X), "label": convert(Y)}
    [found], [expected] = run([columns], seeds=[7]), run([ROWS], seeds=[7])
    assert_close(found, expected, rtol=0, atol=0)
    assert np.abs(found["w"]).max() > 0


def test_a_dict_of_arrays_is_evaluated_in_order():
    batches = pipeline.evaluation_batches({"image": X, "label": Y}, 8)
    for batch, expected in zip(
        batches, pipeline.evaluation_batches(ROWS, 8), strict=True
    ):
        assert_close(batch, expected, rtol=0, atol=0)
    stream = pipeline.evaluation_stream({"image": X}, 8, preprocess=lambda s: s)
    assert_close([b["image"] for b in stream], [b["image"] for b in batches], rtol=0)


def test_names_give_the_seeds_of_a_tasks_samples():
    sources, names = [ROWS, ROWS[::-1]], ["cats", "dogs"]
    named = train.task_batches(sources, CONFIG, names=names)
    seeds = [train.seed_of(name, CONFIG.seed) for name in names]
    assert_close(named[1], train.task_batches(sources, CONFIG, seeds=seeds)[1], rtol=0)
    alone = train.task_batches([sources[1]], CONFIG, names=["dogs"])
    np.testing.assert_array_equal(alone[2]["image"][0], named[2]["image"][1])
    joint = [
        train.joint_batches(sources, CONFIG, names=names),
        train.joint_batches(sources, CONFIG, seeds=seeds),
    ]
    assert_close(joint[0][1], joint[1][1], rtol=0)


def test_without_names_the_positions_are_the_names():
    found = train.task_batches([ROWS] * 2, CONFIG)[0]
    expected = train.task_batches([ROWS] * 2, CONFIG, names=["0", "1"])[0]
    assert_close(found, expected, rtol=0)


PAIRS = list(zip(X, Y, strict=True))
OTHER = [{"x": x, "label": y} for x, y in PAIRS]
RAGGED = [{"image": np.zeros(i + 1, "f4"), "label": 0} for i in range(20)]
WIDE = [{"image": np.zeros(4, "f4"), "label": y} for y in Y]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: run([PAIRS]),
            "a sample is a tuple; expected a dict of arrays.* Write",
        ),
        (lambda: run([OTHER]), "no field 'image'; it has 'label', 'x'.* inputs="),
        (lambda: run([RAGGED]), r"'image' has shapes .* and .* expected one shape"),
        (lambda: run([ROWS, WIDE], names="ab"), "same fields and shapes.*task 1"),
        (lambda: run([ROWS] * 3, names="ab"), r"\[3, 4, 3\], for 2 names \(a, b\)"),
        (lambda: run([ROWS], constants=jnp.ones(2)), r"constants .* for 1 name "),
        (lambda: run({"image": X, "label": Y}), r"sources is a dict .*\[source\]"),
        (lambda: run([{"image": X, "label": Y[:9]}]), "arrays .* of one N"),
        (lambda: run([{}]), "a dict of nothing"),
        (lambda: run([{"image": [[1], [2, 3]]}]), "rows of several shapes"),
        (lambda: train.task_batches([ROWS], CONFIG, names="ab"), "2 names for 1 task;"),
        (
            lambda: train.task_batches([ROWS], CONFIG, names=["a"], seeds=[1]),
            "names and seeds are both given",
        ),
    ],
)
def test_a_mistake_is_one_error_that_says_what_to_write(call, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        call()


def test_a_penalty_sample_without_an_input_is_refused():
    config = train.TrainConfig(
        steps=3, batch_size=4, linearized=True, penalty="cyclic", penalty_batch_size=2
    )
    with pytest.raises(ValueError, match="penalty sample has no field 'image'"):
        run([ROWS], others=[[OTHER]], config=config)
