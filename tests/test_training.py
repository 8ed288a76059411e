import dataclasses
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments.common import bank, runs, training
from jaxarith import fingerprint, sharding, train
from tests import training_run

RECIPE = train.TrainConfig(
    steps=3,
    warmup_steps=1,
    batch_size=4,
    learning_rate=1e-2,
    linearized=True,
    penalty="mixed",
    penalty_batch_size=2,
)
NAMES = ("a", "b", "c")
SOURCES = {
    name: [
        {
            "image": np.random.default_rng((i, j)).normal(size=5).astype(np.float32),
            "label": np.random.default_rng((i, j, 1)).normal(size=2).astype(np.float32),
        }
        for j in range(12)
    ]
    for i, name in enumerate(NAMES)
}


def network():
    return training.Network(
        title="tiny/linear",
        apply_fn=training_run.apply_fn,
        params_0=training_run.params_0(),
        loss=training_run.loss_fn,
        mesh=sharding.one_device(),
        stacked=np.array,
    )


def wanted(folder, name, **changed):
    found = training.Wanted(
        name=name,
        file=bank.vector_file(folder / "bank", "tiny", "linear", name),
        recipe=RECIPE,
        identity={"samples": 12},
        source=SOURCES[name],
        others={other: SOURCES[other] for other in NAMES if other != name},
        head=np.float32(1 + NAMES.index(name)),
    )
    return found._replace(**changed)


def trained(folder, names, together=None, **changed):
    options = runs.Options(out=folder / "out", save_every=2)
    options.out.mkdir(parents=True, exist_ok=True)
    found = training.vectors(
        options,
        network(),
        [wanted(folder, name, **changed) for name in names],
        together=together,
    )
    assert not runs.checkpoints(options).exists()
    return dict(zip(names, map(fingerprint.combined, found), strict=True))


def test_a_vector_is_the_same_whichever_others_are_trained_beside_it(tmp_path):
    apart = trained(tmp_path / "apart", NAMES, together=1)
    assert len(set(apart.values())) == 3
    assert trained(tmp_path / "alone", ["b"]) == {"b": apart["b"]}
    # Two are in the bank, in another order; the third is trained.
    (tmp_path / "apart/bank/tiny/linear/b.safetensors").unlink()
    assert trained(tmp_path / "apart", NAMES[::-1]) == apart
    for number, own in enumerate([NAMES, ("b", "a")]):
        found = trained(tmp_path / f"together{number}", own)
        for name, tau in bank_of(tmp_path / f"together{number}").items():
            # Side by side the same samples are summed in another order.
            np.testing.assert_allclose(
                tau["in"]["kernel"],
                bank_of(tmp_path / "apart")[name]["in"]["kernel"],
                atol=1e-5,
            )
        assert set(found) == set(own)


def bank_of(folder):
    files = (folder / "bank/tiny/linear").glob("*.safetensors")
    return {
        file.stem: bank.read(file, training.identity(wanted(folder, file.stem)))
        for file in files
    }


def test_seed_and_order_of_the_others_are_part_of_the_identity(tmp_path):
    trained(tmp_path, ["a"])
    turned = {name: SOURCES[name] for name in ("c", "b")}
    with pytest.raises(ValueError, match="order of others"):
        trained(tmp_path, ["a"], others=turned)
    seeded = dataclasses.replace(RECIPE, seed=1)
    with pytest.raises(ValueError, match="seed of samples"):
        training.check(network(), [wanted(tmp_path, "a", recipe=seeded)])


def test_more_micro_batches_than_samples_are_found_by_check(tmp_path):
    recipe = dataclasses.replace(RECIPE, micro_batches=100)
    with pytest.raises(ValueError, match="micro-batches"):
        training.check(network(), [wanted(tmp_path, "a", recipe=recipe)])
    assert not list(tmp_path.iterdir())


def test_vectors_that_differ_in_recipe_kind_or_start_train_apart(tmp_path):
    longer = dataclasses.replace(RECIPE, steps=4)
    every = [
        wanted(tmp_path, "a"),
        wanted(tmp_path, "b", kind=32),
        wanted(tmp_path, "c", recipe=longer),
        wanted(tmp_path, "b"),
        wanted(tmp_path, "c", start={}),
        wanted(tmp_path, "c"),
    ]
    groups = [[every.index(one) for one in g] for g in training.alike(every)]
    assert groups == [[0, 3, 5], [1], [2], [4]]
    groups = training.alike(every, together=2)
    assert [len(group) for group in groups] == [2, 1, 1, 1, 1]


def test_a_joint_vector_is_trained_once(tmp_path):
    options = runs.Options(out=tmp_path / "out", save_every=0)
    options.out.mkdir()
    recipe = dataclasses.replace(RECIPE, penalty=None)
    members = [wanted(tmp_path, name) for name in NAMES]
    joint = wanted(tmp_path, "a", recipe=recipe)._replace(name="joint")

    def loss(outputs, batch, scale):
        return training_run.loss_fn(outputs, batch, scale[0])

    net = network()._replace(loss=loss)
    first, again = (
        training.joint_vector(options, net, joint, members) for _ in range(2)
    )
    assert fingerprint.combined(first) == fingerprint.combined(again)
    with pytest.raises(ValueError, match="seed of samples"):
        training.joint_vector(options, net, joint, members[::-1])


def test_no_other_module_trains_a_vector_for_the_bank():
    """So the seeds of all users of the bank come from the tasks' names."""
    folder = Path(experiments.__file__).parent
    calls = {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in folder.rglob("*.py")
    }
    users = {name for name, text in calls.items() if "training.vectors(" in text}
    assert users >= {"common/vision/vectors.py", "common/language/t5_glue.py"}
    for name, text in calls.items():
        if "fine_tune(" in text or "joint_batches(" in text:
            assert name == "common/training.py" or "bank." not in text, name
