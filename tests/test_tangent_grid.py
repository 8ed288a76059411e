"""The benchmark of cached tangents: both of its ways find the same."""

import json

import numpy as np
import pytest
from tiny import random_params, tiny_clip_config

from experiments.bench import tangent_grid
from jaxarith import hub
from jaxarith.models import clip

TINY = {"samples": 32, "tasks": 2, "points": 3, "coefs": 4, "repetitions": 2}
TINY |= {"steps": 4, "forward_steps": 2, "batch_size": 24, "scale": 0.2}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    config = tiny_clip_config()
    config["vision_config"]["num_hidden_layers"] = 1
    layout = clip.layout(clip.CLIPConfig.from_json(config))
    hub.save(folder / "clip", random_params(0, layout), config)
    out = folder / "tangent_grid"
    options = tangent_grid.Config(out, model=folder / "clip", goals=True, **TINY)
    return out, tangent_grid.main(options)


def test_the_cache_finds_what_passes_of_the_linearised_model_find(measured):
    _, results = measured
    assert all(share > 0.1 for share in results["changed"])
    for row in results["rows"]:
        assert 0 < row["outputs_difference"] < 1e-5
        # A tie that rounds the other way changes one prediction.
        assert row["found_difference"] <= 1 / TINY["samples"]
    assert results["adamerging"]["entropy_difference"] < 1e-5
    first, last = results["adamerging"]["entropies"]
    assert first != last


def test_every_way_asks_for_the_outputs_that_grid_and_search_have(measured):
    _, results = measured
    assert [(row["cached"], row["outputs"]) for row in results["rows"]] == [
        ("tangents of both", 2 * (3 + 9)),
        ("tangent of the sum", 2 * 4),
        ("tangents of all", 2 * 4),
    ]


def test_the_search_per_task_is_not_worse_than_the_shared_one(measured):
    found = measured[1]["search_per_task"]
    assert 0 < found["normalized_shared"] <= found["normalized"] <= 1
    assert len(found["coefs"]) == 2
    assert found["outputs"] == 2 * 4 * (1 + 2 * found["sweeps"])


def test_seconds_are_of_the_making_of_the_cache_and_of_its_use(measured):
    for row in measured[1]["rows"]:
        making, using, forward = (
            row[f"{name}_seconds"] for name in ("making", "using", "forward")
        )
        assert min(making, using, forward) > 0
        assert row["speedup"] == pytest.approx(forward / (making + using))
        assert row["speedup_once_made"] == pytest.approx(forward / using)


def test_the_report_has_its_rows_goals_and_figure(measured):
    out, results = measured
    assert sorted(file.name for file in out.iterdir()) == [
        *("report.json", "report.md", "xi.png")
    ]
    assert json.loads((out / "report.json").read_text()) == results
    text = (out / "report.md").read_text()
    assert all(row["cached"] in text for row in results["rows"])
    assert all(goal["goal"] in text for goal in results["goals"])
    assert results["goals"][-1]["met"] and len(results["goals"]) == 3
    assert (out / "xi.png").read_bytes().startswith(b"\x89PNG")


def test_differences_are_relative_to_the_largest_output():
    expected = [lambda c: c * np.array([1.0, -4.0])]
    found = [lambda c: c * np.array([1.0, -4.0]) + np.array([0.2, 0.0])]
    difference = tangent_grid.outputs_difference(found, expected, [1.0, 2.0])
    assert difference == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 1}, "tasks is 1; it must be at least 2"),
        ({"points": 1}, "points is 1"),
        ({"forward_repetitions": 4}, "at most repetitions, which is 3"),
    ],
)
def test_options_that_cannot_work_are_errors_before_the_work(
    tmp_path, options, message
):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        tangent_grid.main(tangent_grid.Config(out, **options))
    assert not out.exists()
