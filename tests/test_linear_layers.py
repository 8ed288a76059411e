"""ξ of representations and of labels, and the pictures of that paper."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special

from experiments.common.vision import pairwise, scores, setups
from experiments.linear_layers import figure4_disentanglement
from jaxarith import plots

COEFS = np.linspace(-2, 2, 5)


@pytest.fixture
def setup(monkeypatch):
    """Two tasks whose features are known functions of the coefficients."""
    rng = np.random.default_rng(0)
    tasks = []
    for moves in rng.normal(size=(2, 2, 6, 4)):
        head = rng.normal(size=(3, 4))
        predict = lambda x, head=head: (x @ head.T).argmax(-1)  # noqa: E731
        tasks.append(
            SimpleNamespace(test=SimpleNamespace(predict=predict, moves=moves))
        )

    def outputs(setup, taus, dataset, linearized):
        return lambda coefs: [np.tanh(np.tensordot(c, dataset.moves, 1)) for c in coefs]

    monkeypatch.setattr(setups, "drawn", lambda setup, split, samples: split)
    monkeypatch.setattr(scores, "outputs", outputs)
    return SimpleNamespace(tasks=tasks)


def test_a_vector_that_is_not_added_leaves_the_other_tasks_part_alone(setup):
    kl, labels = pairwise.disentanglement_error(
        setup,
        [],
        linearized=False,
        coefs=COEFS,
        samples=6,
        distances=list(figure4_disentanglement.DISTANCES.values()),
    )
    zero = 2
    assert kl[zero, zero] == 0 == labels[zero, zero]

    def divergence(first, second):
        p, q = (scipy.special.softmax(x, axis=-1) for x in (first, second))
        entropies = scipy.special.rel_entr(p, q) + scipy.special.rel_entr(q, p)
        return 0.5 * entropies.sum(-1).mean()

    # Without the first vector only the first task's part is left: (0, b) against 0.
    _, second = setup.tasks[0].test.moves
    for j, b in enumerate(COEFS):
        expected = divergence(np.zeros_like(second), np.tanh(b * second))
        assert kl[zero, j] == pytest.approx(expected, rel=1e-5)
    assert kl[zero].max() > 0.01


def test_the_box_holds_coefficients_from_0_to_1():
    coefs = np.array([-1.0, 0.0, 0.5, 1.0, 1.5])
    grid = np.full((5, 5), 100.0)
    grid[1:4, 1:4] = np.arange(9).reshape(3, 3)
    assert figure4_disentanglement.inside(grid, coefs) == 4


def test_xi_is_of_two_tasks(tmp_path):
    config = figure4_disentanglement.Config(
        out=tmp_path / "out", tasks=("dtd", "sun397", "mnist"), smoke=True
    )
    with pytest.raises(ValueError, match="two tasks"):
        figure4_disentanglement.main(config)
    assert not config.out.exists()


def test_maps_of_two_distances_are_drawn_one_above_the_other(tmp_path):
    one, two = np.random.default_rng(0).random((2, 5, 5))
    files = [tmp_path / name for name in ("one.png", "two.png")]
    plots.disentanglement(files[0], {"x": one}, COEFS, ("a", "b"))
    stacked = {"x": np.stack([one, two])}
    scales = figure4_disentanglement.SCALES
    plots.disentanglement(files[1], stacked, COEFS, ("a", "b"), scales=scales)
    heights = [int.from_bytes(file.read_bytes()[20:24]) for file in files]
    assert heights[1] > 1.6 * heights[0]
    with pytest.raises(ValueError):
        plots.disentanglement(tmp_path / "bad.png", stacked, COEFS, ("a", "b"))
    assert not (tmp_path / "bad.png").exists()


def test_values_are_drawn_against_a_reference(tmp_path):
    file = tmp_path / "against.png"
    groups = {"linear": [0.8, 0.9], "ours": [0.85, 0.95]}
    plots.against(file, groups, [0.9, 0.96], ["small", "large"], x="a", y="b")
    assert file.read_bytes().startswith(b"\x89PNG")
