"""Tables of several seeds: the vectors train side by side, and rows are means."""

import dataclasses

import numpy as np
import pytest

from experiments.common.vision import options, seeds, setups, vectors


def test_rows_of_seeds_are_means_with_sample_deviations():
    runs = [
        [{"method": "a", "abs": x, "norm": None, "per": {"t": x}, "coefs": [x, 1.0]}]
        for x in (1.0, 2.0, 6.0)
    ]
    [row] = seeds.averaged(runs)
    assert row["abs"] == 3.0
    np.testing.assert_allclose(row["abs ±"], np.std([1, 2, 6], ddof=1))
    assert row["per"] == {"t": 3.0, "t ±": row["abs ±"]}
    assert (row["method"], row["norm"], row["coefs"]) == ("a", None, [3.0, 1.0])


@pytest.fixture
def setup(tmp_path):
    config = options.Seeded(
        smoke=True, out=tmp_path / "out", bank=tmp_path / "bank", seeds=2
    )
    config = options.started(config, tasks=options.SMOKE[:2])
    return setups.load(config, options.B32)


def test_all_seeds_train_at_once_and_each_as_if_alone(setup, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(
        vectors.training,
        "_run",
        lambda *given, _real=vectors.training._run, **more: (
            runs.append(given[2]) or _real(*given, **more)
        ),
    )
    first, second = seeds.setups(setup)
    found = vectors.vectors(setup, "linear")
    [names] = runs
    assert names[:3:2] == ["mnist, seed 0", "mnist, seed 1"]
    taus = vectors.vectors(second, "linear")  # from the bank
    assert len(runs) == 1
    assert sorted(tmp_path.glob("bank/*/linear_seed_1/mnist.safetensors"))
    alone = setup._replace(
        options=dataclasses.replace(second.options, bank=tmp_path / "other")
    )
    [expected, _] = vectors.vectors(alone, "linear")
    kernels = [
        tau["visual_projection"]["kernel"] for tau in (found[0], taus[0], expected)
    ]
    np.testing.assert_allclose(kernels[1], kernels[2], atol=1e-6)
    assert np.abs(kernels[1] - kernels[0]).max() > 1e-5
    assert (first.options.seed, first.options.seeds) == (0, 1)
