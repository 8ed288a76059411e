"""The measured functions: the same in both libraries, and what they report."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import (
    encoders,
    jvp_cost,
    jvp_report,
    jvp_rows,
    jvp_steps,
    measure,
)
from jaxarith import curvature, tree
from jaxarith.models import t5

CONFIG = jvp_cost.Config(
    Path("unused"), model="tiny", batch=(8,), layers=1, torch=False
)
POINT = jvp_steps.Point("tiny", 8, layers=1)


@pytest.fixture(scope="module")
def work():
    return jvp_steps.prepare(POINT)


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
        "gpt2-medium": 354_823_168,
        "bert": 108_891_648,
    }


@pytest.mark.parametrize("name", ["vit-b-32", "vit-l-14", "gpt2", "bert"])
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
        "bert": (28_311_552, 36_864, 84_934_656, 82_944),
    }[name]


def test_the_linearised_gradient_is_the_same_in_every_form(work):
    rows = jvp_steps.steps(work)
    names = ["linearised step", "linearised step, transposed", "linearised step, remat"]
    results = [jax.jit(rows[name][0])(*rows[name][1]) for name in names]
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            *(other, results[0]),
        )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(results[0]))


def test_curvature_adds_the_gradient_of_its_form(work):
    rows = jvp_steps.steps(work)
    factors = work.factors
    plain, curved = [
        jax.jit(rows[name][0])(*rows[name][1])
        for name in ("linearised step", "+ curvature")
    ]
    moved = curvature.product(work.taus[0], factors)
    jax.tree.map(
        lambda a, b, m: np.testing.assert_allclose(
            a, b + 2 * jvp_steps.PENALTY_COEF * m, rtol=1e-5, atol=1e-6
        ),
        *(curved, plain, moved),
    )
    assert factors.layers and not factors.sketch


def test_many_tangents_are_those_of_single_calls(work):
    rows = jvp_steps.steps(work)
    function, args = rows[jvp_steps.MANY[0]]
    outputs, tangents = jax.jit(function)(*args)
    function, args = rows[jvp_steps.MANY[1]]
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
    assert "is for trying the script" in (tmp_path / "report.md").read_text()
    for row in results["rows"]:
        assert 0 < row["shortest"] <= row["seconds"] <= row["longest"]
        assert row["compile_seconds"] > 0
        rate = row["tokens_per_second"] / row["samples_per_second"]
        assert rate == pytest.approx(encoders.encoder("tiny").tokens)
    assert 1.5 < results["rows"][1]["flop_ratio"] < 1.7
    assert {"report.json", "report.md", "cost.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_batches_and_lengths_share_a_table_and_a_figure(tmp_path, monkeypatch):
    small = functools.partial(t5.T5Config, vocab_size=64, d_model=32, d_kv=8, d_ff=64)
    monkeypatch.setattr(t5, "T5Config", small)
    config = jvp_cost.Config(
        *(tmp_path, "t5-small-encoder", (8, 16), (8, 24)),
        torch=False,
        rows=("forward",),
        repetitions=2,
        layers=1,
    )
    rows = jvp_cost.main(config)["rows"]
    sizes = [(row["batch"], row["length"]) for row in rows]
    assert sizes == [(8, 8), (16, 8), (8, 24), (16, 24)]
    flops = {size: row["flops"] for size, row in zip(sizes, rows, strict=True)}
    assert flops[16, 8] == pytest.approx(2 * flops[8, 8], rel=0.01)
    assert 3 * flops[8, 8] < flops[8, 24] < 4 * flops[8, 8]  # attention grows faster
    text = (tmp_path / "report.md").read_text()
    assert text.count("| batch | length |") == 1
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a length of 64 tokens for tiny"):
        jvp_cost.main(dataclasses.replace(config, model="tiny", length=(64,)))


def test_a_machine_that_is_not_quiet_is_named():
    assert not measure.unquiet({"load": 0.5, "cores": 2})
    [text] = measure.unquiet({"load": 3.1, "cores": 2})
    assert "3.1 processes ran on its 2 cores" in text
    [text] = measure.unquiet({"load": 0.1, "cores": 2, measure.OTHERS: 1.2})
    assert "1.2 cores were busy with others while rows ran" in text


def test_the_work_of_other_processes_is_counted_without_ones_own(monkeypatch):
    for name, values in (("_busy", [10.0, 14.0]), ("_own", [1.0, 2.0])):
        monkeypatch.setattr(measure, name, functools.partial(next, iter(values)))
    clock = functools.partial(next, iter([0.0, 2.0]))
    monkeypatch.setattr(measure.time, "perf_counter", clock)
    with measure.watched() as others:
        pass
    assert others == {measure.OTHERS: 1.5}
    monkeypatch.undo()
    busy = measure._busy()
    assert busy is None or busy >= measure._own() > 0


def test_wrong_options_are_refused_before_any_work(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="batch of \\(16, 4\\); at least 8"):
        jvp_cost.main(dataclasses.replace(CONFIG, out=out, batch=(16, 4)))
    with pytest.raises(ValueError, match=r"unknown rows \['JVPS'\]; the rows are for"):
        jvp_cost.main(dataclasses.replace(CONFIG, out=out, rows=("JVPS",)))
    assert not out.exists()


@pytest.mark.torch
@pytest.mark.parametrize("model", ["tiny", "t5-small", "gpt2", "bert"])
def test_pytorch_computes_the_same(model, monkeypatch):
    pytest.importorskip("torch")
    from experiments.bench import torch_tangent

    for module, name, few in [
        (encoders, "TOKENS", 16),
        (encoders, "TARGET_TOKENS", 8),
        (jvp_steps, "TASKS", 2),
    ]:
        monkeypatch.setattr(module, name, few)
    work = jvp_steps.prepare(POINT._replace(model=model))
    names = ["forward", "linearised step"]
    if model == "tiny":  # the other rows are made of the same calls
        names += ["ordinary step", "JVP", "+ cyclic τJp", "+ strict τJp"]
        names += [jvp_steps.linearized_part("1"), jvp_steps.ordinary_part("1")]
    rows = jvp_steps.steps(work)
    ours = {name: jvp_rows.compile_row(name, *rows[name]).run for name in names}
    theirs = torch_tangent.steps(work, "cpu", "float32", jvp_steps.PENALTY_COEF)
    apart = torch_tangent.compare(ours, theirs, "float32")
    assert list(apart) == names and max(apart.values()) < 1e-5


@pytest.mark.torch
def test_pytorchs_rows_have_both_forms_and_their_memory(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    # Without a compiler of C++.
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    name = jvp_steps.ordinary_part("1")
    config = dataclasses.replace(
        CONFIG, out=tmp_path, torch=True, rows=(name,), repetitions=2
    )
    results = jvp_cost.main(config)
    [row] = results["rows"]
    for form in ("eager", "compiled"):
        assert 0 < row[form]["shortest"] <= row[form]["longest"]
        assert row[form]["peak_bytes"] is None or row[form]["peak_bytes"] >= 0
    assert row["compiled"]["compile_seconds"] > 0
    faster = min(row[form]["seconds"] for form in ("eager", "compiled"))
    assert row["torch_over_jaxarith"] == faster / row["seconds"]
    assert "| faster PyTorch / ours |" in (tmp_path / "report.md").read_text()


@pytest.mark.torch
def test_a_row_that_does_not_compile_is_named(monkeypatch):
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_tangent

    def fails(function, dynamic):
        def run():
            raise RuntimeError("no kernel for this\nand more")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    rows, checks = torch_tangent.compared_rows(
        {"forward": lambda: torch.ones(3)},
        {"forward": lambda: jnp.ones(3), "JVP": lambda: jnp.ones(3)},
        "float32",
        compile=True,
    )
    assert list(rows) == ["forward"] and rows["forward"].compiled is None
    assert checks["torch.compile"] == {"forward": "no kernel for this"}


@pytest.mark.torch
def test_results_that_differ_are_refused():
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_tangent

    ours = {"forward": lambda: jnp.ones(3)}
    theirs = {"forward": lambda: 1.01 * torch.ones(3)}
    with pytest.raises(ValueError, match="forward: JAX and PyTorch are 0.0099 apart"):
        torch_tangent.compare(ours, theirs, "float32")
