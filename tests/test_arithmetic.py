"""Addition, negation and ξ of the vision papers, on a model of a few numbers."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import tables
from experiments.common.vision import (
    objectives,
    pairwise,
    scores,
    setups,
    sources,
    vectors,
)
from jaxarith import losses, sharding, task_vectors, tree
from jaxarith.data import images, pipeline
from jaxarith.models import heads


def apply_fn(params, x):
    flat = x.reshape(len(x), -1)
    return jnp.tanh(flat @ params["w"]) + params["b"][None]


def identity(image):
    return np.asarray(image, np.float32)


def start():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(12, 6)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=6), jnp.float32),
    }


def drawn_taus():
    rng = np.random.default_rng(5)
    return [
        jax.tree.map(
            lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32), start()
        )
        for _ in range(2)
    ]


def task_of(seed, samples=40, classes=5):
    """A task of which two labels of three are those of the model half way."""
    rng = np.random.default_rng(seed)
    half_way = task_vectors.apply(start(), task_vectors.add(drawn_taus()), 0.5)
    head = jnp.asarray(10 * rng.normal(size=(classes, 6)), jnp.float32)

    def dataset(count):
        x = rng.normal(size=(count, 2, 2, 3)).astype(np.float32)
        labels = np.array(heads.logits(head, apply_fn(half_way, x))).argmax(-1)
        labels[::3] = rng.integers(classes, size=len(labels[::3]))
        source = [
            {"image": image, "label": int(label)}
            for image, label in zip(x, labels, strict=True)
        ]
        batches = pipeline.evaluation_stream(
            source, 16, preprocess=sources.Preprocessed(identity)
        )
        labels = sources.labels(source)
        return setups.Dataset(source, len(source), batches, labels, head)

    test = dataset(samples)
    return setups.Task(f"task{seed}", f"Task {seed}", [], {}, dataset(samples), test)


@pytest.fixture(scope="module")
def setup():
    return setups.Setup(
        options=SimpleNamespace(smoke=False, evaluation_batch=16, workers=0),
        model="model",
        apply_fn=apply_fn,
        trained_fn=apply_fn,
        params_0=start(),
        identity=0,
        preprocess=identity,
        augment=None,
        tasks=[task_of(1), task_of(2)],
        control=task_of(3),
        mesh=sharding.one_device(),
    )


@pytest.fixture(scope="module")
def taus():
    return drawn_taus()


def features(setup, tau, dataset, linearized):
    """The model by its definition, all samples at once."""
    x = np.stack([sample["image"] for sample in dataset.source])
    if not linearized:
        return apply_fn(task_vectors.apply(setup.params_0, tau), x)
    f0, moved = jax.jvp(lambda p: apply_fn(p, x), (setup.params_0,), (tau,))
    return f0 + moved


def accuracy(setup, tau, dataset, linearized):
    logits = heads.logits(dataset.head, features(setup, tau, dataset, linearized))
    return float(np.mean(np.argmax(logits, -1) == dataset.labels))


def scaled(tau, coef):
    return jax.tree.map(lambda leaf: coef * leaf, tau)


@pytest.mark.parametrize("linearized", [False, True])
def test_addition_is_its_definition(setup, taus, linearized):
    found = scores.addition(setup, taus, linearized=linearized)
    total = task_vectors.add(taus)
    nothing = scaled(total, 0.0)

    def of(vector, split="test"):
        return [
            accuracy(setup, vector, getattr(task, split), linearized)
            for task in setup.tasks
        ]

    def own(split):
        pairs = zip(setup.tasks, taus, strict=True)
        return [accuracy(setup, v, getattr(t, split), linearized) for t, v in pairs]

    single = own("validation")
    normalized = [
        np.mean(np.divide(of(scaled(total, c), "validation"), single))
        for c in scores.COEFS
    ]
    best = scores.COEFS[int(np.argmax(normalized))]
    assert 0 < best and len(set(normalized)) > 3
    np.testing.assert_allclose(found.search.normalized, normalized, rtol=1e-6)
    assert found.search.coef == best
    np.testing.assert_allclose(found.zero_shot, of(nothing))
    np.testing.assert_allclose(found.single, own("test"))
    np.testing.assert_allclose(found.at_one, of(total))
    np.testing.assert_allclose(found.searched, of(scaled(total, best)))
    norm = 100 * np.mean(np.divide(found.at_one, found.single))
    assert found.row(searched=False)["norm"] == pytest.approx(norm)


@pytest.mark.parametrize("linearized", [False, True])
def test_negation_forgets_most_where_the_control_is_kept(setup, taus, linearized):
    found = scores.negation(setup, taus, linearized=linearized)
    coefs = scores.NEGATION_COEFS
    pairs, at_one = [], []
    for task, tau, chosen in zip(setup.tasks, taus, found.coefs, strict=True):

        def at(split, c, task=task, tau=tau):
            vector = scaled(tau, -c)
            return [
                accuracy(setup, vector, getattr(t, split), linearized)
                for t in (task, setup.control)
            ]

        curve = np.array([at("validation", c) for c in coefs])
        kept = curve[:, 1] >= 0.95 * curve[0, 1]
        target = np.where(kept, curve[:, 0], np.inf)
        assert chosen == coefs[int(np.argmin(target))]
        pairs.append(at("test", chosen))
        at_one.append(at("test", 1.0))
    np.testing.assert_allclose(found.searched, 100 * np.mean(pairs, axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.at_one, 100 * np.mean(at_one, axis=0), rtol=1e-6)


@pytest.mark.parametrize("linearized", [False, True])
@pytest.mark.parametrize("of_labels", [False, True])
def test_disentanglement_error_is_its_definition(setup, taus, linearized, of_labels):
    coefs = np.array([-1.0, 0.0, 0.5])
    both = [pairwise.symmetric_kl, pairwise.labels_differ]
    found = pairwise.disentanglement_error(
        setup, taus, linearized=linearized, coefs=coefs, distances=both
    )[int(of_labels)]

    def between(task, first, second):
        p, q = (features(setup, v, task.test, linearized) for v in (first, second))
        if of_labels:
            a, b = (np.argmax(heads.logits(task.test.head, x), -1) for x in (p, q))
            return np.mean(a != b)
        p, q = (
            np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in map(np.array, (p, q))
        )
        return np.mean(np.sum(p * np.log(p / q) + q * np.log(q / p), -1)) / 2

    for i, a in enumerate(coefs):
        for j, b in enumerate(coefs):
            alone = scaled(taus[0], a), scaled(taus[1], b)
            both = task_vectors.add(alone)
            expected = sum(
                between(task, own, both)
                for task, own in zip(setup.tasks, alone, strict=True)
            )
            np.testing.assert_allclose(found[i, j], expected, rtol=1e-4, atol=1e-6)
    assert found[1, 1] == pytest.approx(0, abs=1e-7) and found[0, 2] > 0.01


def test_a_pair_has_the_mean_of_both_directions():
    matrix = np.arange(9.0).reshape(3, 3)
    assert pairwise.pair_values(matrix) == [2.0, 4.0, 6.0]


def test_the_loss_of_all_tasks_is_the_mean_of_theirs():
    rng = np.random.default_rng(0)
    head_of = [jnp.asarray(rng.normal(size=(c, 6)), jnp.float32) for c in (3, 5)]
    labels = np.array([[0, 4], [2, 1], [1, 3], [2, 2]])  # by sample and task
    found = jnp.asarray(rng.normal(size=(4, 2, 6)), jnp.float32)
    expected = np.mean(
        [
            losses.cross_entropy(heads.logits(head, found[:, i]), labels[:, i])
            for i, head in enumerate(head_of)
        ]
    )
    order = rng.permutation(8)  # samples may come in any order
    batch = {
        "label": jnp.asarray(labels.reshape(-1)[order]),
        "task": jnp.asarray(np.tile([0, 1], 4)[order]),
    }
    actual = objectives.joint(found.reshape(8, 6)[order], batch, heads.pad(head_of))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_ascent_is_descent_of_the_negated_loss():
    head = {"head": jnp.eye(3), "valid": jnp.ones(3, bool)}
    batch = {"label": jnp.array([0, 2])}
    outputs = jnp.asarray([[1.0, 2.0, 0.5], [0.1, 0.2, 1.0]])
    assert objectives.ascent(outputs, batch, head) == -objectives.loss(
        outputs, batch, head
    )


def names_of(tasks):
    return [task.name for task in tasks]


def test_the_penalty_keeps_other_tasks_in_order_and_the_control_last(setup):
    setup = setup._replace(tasks=[task_of(i) for i in (1, 2, 4)])
    middle = setup.tasks[1]
    others = {
        method: names_of(vectors.others_of(setup, method, middle))
        for method in (
            "tau_jp_cyclic",
            "tau_jp_incremental",
            "tau_jp_incremental_no_control",
        )
    }
    assert others == {
        "tau_jp_cyclic": ["task1", "task4", "task3"],
        "tau_jp_incremental": ["task1", "task3"],
        "tau_jp_incremental_no_control": ["task1"],
    }


def test_published_values_stand_beside_ours_and_a_wrong_number_of_them_is_refused():
    rows = [{"method": "a", "abs": 1.0, "norm": 2.0}, {"method": "b", "abs": 3.0}]
    names = {"keys": ["method"], "values": ["abs", "norm"]}
    found = tables.beside(rows, {"a": (5.0, None)}, **names)
    assert found[0]["abs, published"] == 5.0 and found[1]["abs, published"] is None
    text = tables.markdown(found)
    assert "norm, published" not in text and "5.0" in text
    with pytest.raises(ValueError, match="1 published values"):
        tables.beside(rows, {"a": (5.0,)}, **names)


def test_a_sample_is_augmented_and_preprocessed_by_what_pickles():
    rng = np.random.default_rng(0)
    sample = {"image": rng.integers(0, 255, (9, 7), dtype=np.uint8), "label": 3}
    evaluated = sources.Preprocessed(images.Preprocessing(6))(sample)
    trained = sources.Augmented(images.Augmentation(6))(sample, rng)
    assert evaluated["image"].shape == trained["image"].shape == (6, 6, 3)
    assert trained["label"] == evaluated["label"] == 3
    assert not np.array_equal(evaluated["image"], trained["image"])


def test_part_of_a_source_has_its_labels_and_samples():
    source = [{"image": i, "label": i % 3} for i in range(20)]
    part = sources.limited(source, 5)
    assert len(part) == 5 and len({part[i]["image"] for i in range(5)}) == 5
    assert sources.labels(part).tolist() == [part[i]["label"] for i in range(5)]


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ("clip-vit-base-patch32", (28_311_552, 28_348_416, 84_934_656, 85_017_600)),
        (
            "clip-vit-large-patch14",
            (100_663_296, 100_761_600, 301_989_888, 302_211_072),
        ),
    ],
)
def test_paradigms_train_as_many_parameters_as_the_papers_layers_have(model, counts):
    file = Path(__file__).parent / f"layouts/{model}.json"
    layout = json.loads(file.read_text())
    shapes = {path: np.empty(shape, bool) for path, shape in layout.items()}
    whole = tree.unflatten(shapes)
    found = tuple(
        sum(leaf.size for leaf in tree.flatten(tree.select(whole, pattern)).values())
        for pattern in vectors.LINEAR_LAYERS.values()
    )
    assert found == counts
