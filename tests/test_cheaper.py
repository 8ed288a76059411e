"""The comparison of cheaper tangent-space training: its budgets and what it writes."""

import dataclasses
import itertools
import json
import statistics
import types

import numpy as np
import pytest

from experiments.bench import cheaper, measure
from experiments.common.vision import small_study
from jaxarith import hub, tree
from jaxarith.models import clip

RATIOS = {"linear": 0.8, "cyclic": 1.0, "strict": 1.6, "attention": 0.64}


def test_at_equal_time_a_variant_gets_steps_in_inverse_proportion_to_their_seconds():
    assert cheaper.trainings(RATIOS, 200, RATIOS) == [
        ("linear", "equal time", 250),
        ("cyclic", "equal time", 200),
        ("strict", "equal time", 125),
        ("strict", "equal steps", 200),
        ("attention", "equal time", 312),
        ("attention", "equal steps", 200),
    ]
    assert cheaper.steps_in_time(3, 100.0) == 1


@pytest.mark.parametrize("variant", cheaper.VARIANTS)
def test_every_variant_trains_in_the_tangent_space_with_a_proportional_warm_up(variant):
    penalty, trained, _ = cheaper.VARIANTS[variant]
    options = small_study.Config(out="unused", steps=125, seed=3)
    recipe = cheaper.recipe_of(options, variant)
    assert recipe.linearized
    assert (recipe.penalty, recipe.trained) == (penalty, trained)
    assert (recipe.steps, recipe.warmup_steps, recipe.seed) == (125, 12, 3)


def test_the_spread_over_seeds_is_the_sample_standard_deviation():
    values = [0.7, 0.9, 0.85]
    assert cheaper.spread(values) == {
        "mean": pytest.approx(statistics.mean(values)),
        "std": pytest.approx(statistics.stdev(values)),
        "min": 0.7,
        "max": 0.9,
    }
    assert cheaper.spread([0.5])["std"] is None


def test_seeds_are_summed_up_within_their_variant_and_budget():
    shared = {"steps": 1, "seconds_per_step": 0.2, "ratio": 1.0}
    shared |= {"flops_per_step": 3e9, "trained_entries": 7}
    cases = [
        ("strict", "equal time", 0, 0.5),
        ("strict", "equal steps", 0, 0.1),
        ("strict", "equal time", 1, 0.7),
    ]
    rows = [
        {"variant": variant, "budget": budget, "seed": seed}
        | shared
        | dict.fromkeys(cheaper.MEASURES, value)
        for variant, budget, seed, value in cases
    ]
    first, second = summary = cheaper.summarize(rows)
    assert (first["budget"], first["seeds"]) == ("equal time", [0, 1])
    assert first["normalized"]["mean"] == pytest.approx(0.6)
    assert (second["budget"], second["seeds"]) == ("equal steps", [0])
    lines = cheaper.table(summary).splitlines()
    assert "0.600 ± 0.141 (0.500..0.700)" in lines[2] and "±" not in lines[3]


def clock(durations):
    """Seconds at every other call after which one of the durations has passed."""
    ends = itertools.chain.from_iterable((0.0, d) for d in itertools.cycle(durations))
    return types.SimpleNamespace(perf_counter=itertools.accumulate(ends).__next__)


def test_a_tiny_run_writes_all_it_promises(tmp_path, monkeypatch, shallow_clip):
    # Of a step of cyclic and of attention, which run in turn.
    monkeypatch.setattr(measure, "time", clock([4.0, 1.0]))
    config = cheaper.Config(
        tmp_path / "out",
        model=shallow_clip,
        tasks=("mnist", "uci_digits"),
        variants=("cyclic", "attention"),
        seeds=(5,),
        steps=2,
        timed_steps=1,
        batch_size=8,
        samples=100,
    )
    results, out = cheaper.main(config), config.out
    assert json.loads((out / "report.json").read_text()) == results
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == results["rows"]
    costs = results["costs"]
    assert {name: cost["ratio"] for name, cost in costs.items()} == {
        "cyclic": 1.0,
        "attention": 0.25,
    }
    assert [(r["variant"], r["budget"], r["steps"]) for r in results["rows"]] == [
        ("cyclic", "equal time", 2),
        ("attention", "equal time", 8),
        ("attention", "equal steps", 2),
    ]
    for row in results["rows"]:
        cost = costs[row["variant"]]
        assert row["seed"] == 5 and row.items() >= cost.items()
        name = f"{row['variant']}_{row['budget'].replace(' ', '_')}_seed_5"
        log = (out / f"train_{name}.jsonl").read_text().splitlines()
        assert len(log) == row["steps"]
        ratios = [
            row["per_task"][task] / row["individual_per_task"][task]
            for task in config.tasks
        ]
        assert row["normalized"] == pytest.approx(np.mean(ratios))
        for mean, kind in (
            ("absolute", "per_task"),
            ("individual", "individual_per_task"),
        ):
            assert row[mean] == pytest.approx(np.mean(list(row[kind].values())))
    # The vector that was trained is of the attention weights and of nothing else.
    file = out / "task_vectors" / "attention_equal_steps_seed_5"
    tau, _ = hub.load_tree(file / "mnist.safetensors")
    vision = clip.load(config.model).config.vision
    entries = 4 * vision.num_hidden_layers * vision.hidden_size**2
    assert tree.size(tau) == costs["attention"]["trained_entries"] == entries
    assert all(np.abs(leaf).max() > 0 for leaf in tree.flatten(tau).values())
    assert costs["cyclic"]["trained_entries"] > entries
    assert costs["attention"]["flops_per_step"] < costs["cyclic"]["flops_per_step"]
    text = (out / "report.md").read_text()
    assert cheaper.table(results["summary"]) in text and len(results["summary"]) == 3
    assert (out / "normalized.png").read_bytes().startswith(b"\x89PNG")
    # What took long is not written over.
    with pytest.raises(ValueError, match="holds results; give another folder"):
        cheaper.main(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("cyclic", "cheap")}, r"unknown variants \['cheap'\]; known are"),
        ({"variants": ()}, r"variants are \[\]; give at least one"),
        ({"seeds": (1, 1)}, r"seeds are \[1, 1\]; .* each once"),
        ({"tasks": ("mnist",)}, "at least two tasks; got mnist"),
        ({"tasks": ("mnist", "mnist")}, "tasks are .* each once"),
        ({"timed_steps": 0}, "timed_steps is 0; at least 1"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path, options, message):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        cheaper.main(dataclasses.replace(cheaper.Config(out), **options))
    assert not out.exists()
