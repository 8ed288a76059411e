"""The script for accelerators, at a tiny size on a CPU: rows, time, leftovers."""

import dataclasses
import json
import time

import pytest

from experiments.bench import accelerator

ROWS = ("linearised step", accelerator.ALONE)


@pytest.fixture
def config(tmp_path):
    return accelerator.Config(
        tmp_path / "out",
        models=("tiny",),
        batch=8,
        device="cpu",
        torch=False,
        rows=ROWS,
        minutes=1000,  # a busy machine is no reason to fail
        repetitions=1,
        layers=1,
    )


def test_every_dtype_has_its_rows_and_the_report_says_that_the_model_is_tiny(config):
    results = accelerator.main(config)
    assert results["left_out"] == []
    found = [(row["model"], row["dtype"], row["row"]) for row in results["rows"]]
    assert found == [("tiny", d, r) for d in ("float32", "bfloat16") for r in ROWS]
    for row in results["rows"]:
        assert 0 < row["shortest"] <= row["seconds"] <= row["longest"]
    text = (config.out / "report.md").read_text()
    assert "is for trying the script" in text and "| dtype " in text
    assert json.loads((config.out / "report.json").read_text()) == results


def test_without_time_every_row_is_left_out_by_name(config):
    results = accelerator.main(dataclasses.replace(config, minutes=0))
    assert results["rows"] == []
    assert [(x["dtype"], x["row"], x["why"]) for x in results["left_out"]] == [
        (dtype, row, "no time") for dtype in ("float32", "bfloat16") for row in ROWS
    ]
    assert "4 rows were not measured" in (config.out / "report.md").read_text()


def test_a_row_starts_only_if_the_longest_so_far_would_end_in_time():
    clock = accelerator.Clock(time.perf_counter() + 100)

    def start():
        return lambda name: {"row": name}

    deadline = clock.share(2)
    assert deadline - time.perf_counter() == pytest.approx(50, abs=1)
    found = list(accelerator.run_case(["a"], start, clock, deadline))
    assert found == [("a", {"row": "a"})] and 0 < clock.longest < 1
    clock.longest = 60
    assert list(accelerator.run_case(["a"], start, clock, deadline)) == [
        ("a", "no time")
    ]


def test_a_row_that_fails_leaves_the_others():
    def measured(name):
        if name == "b":
            raise MemoryError("out of memory")
        return {"row": name}

    clock = accelerator.Clock(time.perf_counter() + 100)
    found = accelerator.run_case("abc", lambda: measured, clock, clock.end)
    assert list(found) == [
        ("a", {"row": "a"}),
        ("b", "out of memory"),
        ("c", {"row": "c"}),
    ]


def test_wrong_options_are_refused_before_any_work(config):
    with pytest.raises(ValueError, match="batch of 4; at least 8"):
        accelerator.main(dataclasses.replace(config, batch=4))
    with pytest.raises(ValueError, match=r"unknown rows \['JVPS'\]"):
        accelerator.main(dataclasses.replace(config, rows=("JVPS",)))
    assert not config.out.exists()


@pytest.mark.torch
def test_pytorch_runs_beside_the_rows_that_it_has(config):
    pytest.importorskip("torch")
    results = accelerator.main(
        dataclasses.replace(config, torch=True, compile=False, dtypes=("float32",))
    )
    assert results["left_out"] == []
    for row in results["rows"]:
        assert row["eager"]["seconds"] > 0 and row["compiled"] is None
