"""The measured functions: the same in both libraries, and what they report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import encoders, jvp_cost, jvp_report, measure
from jaxarith import curvature, tree

CONFIG = jvp_cost.Config("unused", model="tiny", batch=8, layers=1, torch=False)


@pytest.fixture(scope="module")
def work():
    return jvp_cost.prepare(CONFIG)


def test_the_encoders_have_their_published_sizes():
    sizes = {
        name: tree.size(encoders.encoder(name).layout)
        for name in encoders.NAMES
        if name != "tiny"
    }
    assert sizes == {
        "vit-b-32": 87_456_000 + 768 * 512,
        "vit-b-16": 85_799_424 + 768 * 512,
        "vit-l-14": 303_179_776 + 1024 * 768,
        "t5-small-encoder": 35_330_816,
        "t5-small": 60_506_624,
        "gpt2": 124_439_808,
    }


@pytest.mark.parametrize("name", ["vit-b-32", "vit-l-14", "gpt2"])
def test_the_paradigms_train_as_many_entries_as_published(name):
    encoder = encoders.encoder(name)
    found = [
        tree.size(tree.select(encoder.layout, pattern))
        for pattern in encoder.paradigms.values()
    ]
    first, second, third, fourth = found
    assert (first, second - first, third, fourth - third) == {
        "vit-b-32": (28_311_552, 36_864, 84_934_656, 82_944),
        "vit-l-14": (100_663_296, 98_304, 301_989_888, 221_184),
        "gpt2": (28_311_552, 36_864, 84_934_656, 82_944),
    }[name]


def test_the_linearised_gradient_is_the_same_in_every_form(work):
    rows = jvp_cost.steps(work)
    names = ["linearised step", "linearised step, transposed", "linearised step, remat"]
    results = [jax.jit(rows[name][0])(*rows[name][1]) for name in names]
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            *(other, results[0]),
        )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(results[0]))


def test_curvature_adds_the_gradient_of_its_form(work):
    rows = jvp_cost.steps(work)
    factors = work.factors
    plain, curved = [
        jax.jit(rows[name][0])(*rows[name][1])
        for name in ("linearised step", "+ curvature")
    ]
    moved = curvature.product(work.taus[0], factors)
    jax.tree.map(
        lambda a, b, m: np.testing.assert_allclose(
            a, b + 2 * jvp_cost.PENALTY_COEF * m, rtol=1e-5, atol=1e-6
        ),
        *(curved, plain, moved),
    )
    assert factors.layers and not factors.sketch


def test_many_tangents_are_those_of_single_calls(work):
    rows = jvp_cost.steps(work)
    function, args = rows[f"{jvp_report.TASKS} tangents by jvps"]
    outputs, tangents = jax.jit(function)(*args)
    function, args = rows[f"{jvp_report.TASKS} JVPs"]
    for moved, (f0, expected) in zip(tangents, function(*args), strict=True):
        np.testing.assert_allclose(outputs, f0, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)


def row_of(name, seconds, **changes):
    found = {"row": name, "seconds": seconds, "flops": 3e9, "temporary_bytes": 8}
    return found | {"torch_over_jaxarith": None} | changes


def test_goals_are_ratios_of_the_rows_that_were_measured():
    rows = [
        row_of("ordinary step", 2.0),
        row_of("linearised step", 3.0, flops=6e9, torch_over_jaxarith=1.5),
        row_of("+ strict τJp", 9.0),
        row_of("linearised step, remat", 3.6, temporary_bytes=2),
    ]
    found = {g["goal"]: (g["reached"], g["met"]) for g in jvp_report.goals(rows, True)}
    assert found == {
        "linearised over ordinary": (1.5, True),
        "linearised over ordinary, FLOPs": (2.0, False),
        "strict over linearised": (3.0, False),
        "linearised step, remat: memory saved": (4.0, True),
        "linearised step, remat: time": (1.2, True),
        "linearised step: PyTorch's faster time over ours": (1.5, True),
    }


def test_the_report_holds_the_rows_asked_for(tmp_path):
    rows = ("ordinary step", "linearised step")
    config = dataclasses.replace(CONFIG, out=tmp_path, rows=rows, repetitions=1)
    results = jvp_cost.main(config)
    assert [row["row"] for row in results["rows"]] == list(rows)
    assert results["rows"][0]["ratio"] == 1
    assert results["goals"] == [] and results["machine"]["load"] >= 0
    for row in results["rows"]:
        assert 0 < row["shortest"] <= row["seconds"] <= row["longest"]
        assert row["compile_seconds"] > 0
    assert 1.5 < results["rows"][1]["flop_ratio"] < 1.7
    assert {"report.json", "report.md", "cost.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_machine_that_is_not_quiet_is_named():
    assert not measure.unquiet({"load": 0.5, "cores": 2})
    [text] = measure.unquiet({"load": 3.1, "cores": 2})
    assert "3.1 processes ran on its 2 cores" in text


def test_wrong_options_are_refused_before_any_work(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="batch of 4; at least 8"):
        jvp_cost.main(dataclasses.replace(CONFIG, out=out, batch=4))
    with pytest.raises(ValueError, match=r"unknown rows \['JVPS'\]; the rows are for"):
        jvp_cost.main(dataclasses.replace(CONFIG, out=out, rows=("JVPS",)))
    assert not out.exists()


@pytest.mark.torch
@pytest.mark.parametrize("model", ["tiny", "t5-small", "gpt2"])
def test_pytorch_computes_the_same(model, monkeypatch):
    pytest.importorskip("torch")
    from experiments.bench import torch_tangent

    for module, name, few in [
        (encoders, "TOKENS", 16),
        (encoders, "TARGET_TOKENS", 8),
        (jvp_cost, "TASKS", 2),
    ]:
        monkeypatch.setattr(module, name, few)
    config = dataclasses.replace(CONFIG, model=model, torch=True, compile=False)
    work = jvp_cost.prepare(config)
    names = ["forward", "linearised step"]
    if model == "tiny":  # the other rows are made of the same calls
        names += ["ordinary step", "JVP", "+ cyclic τJp", "+ strict τJp"]
        names += [jvp_report.part_name("1")]
    rows = jvp_cost.steps(work)
    ours = {name: jvp_cost.compile_row(name, *rows[name]).run for name in names}
    theirs = torch_tangent.steps(work, "cpu", "float32", jvp_cost.PENALTY_COEF)
    apart = torch_tangent.compare(ours, theirs, "float32")
    assert list(apart) == names and max(apart.values()) < 1e-5


@pytest.mark.torch
def test_results_that_differ_are_refused():
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_tangent

    ours = {"forward": lambda: jnp.ones(3)}
    theirs = {"forward": lambda: 1.01 * torch.ones(3)}
    with pytest.raises(ValueError, match="forward: JAX and PyTorch are 0.0099 apart"):
        torch_tangent.compare(ours, theirs, "float32")
