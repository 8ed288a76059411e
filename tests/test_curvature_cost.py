"""The bench of curvature: its rows, on a model of one block."""

import pytest

from experiments.bench import curvature


@pytest.mark.torch
def test_the_rows_are_counted_and_timed(tmp_path):
    pytest.importorskip("torch")
    config = curvature.Config(
        out=tmp_path, batch=8, layers=1, rank=2, repetitions=1, torch=True
    )
    found = curvature.main(config)
    rows = {row["program"]: row for row in found["rows"]}
    assert rows["linearised step"]["over a linearised step"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    factors, alone = rows["+ factors"], rows["gradient of the penalty alone"]
    step = rows["linearised step"]
    # The penalty is added to a step once, and costs what it costs alone.
    assert factors["GFLOP"] == pytest.approx(step["GFLOP"] + alone["GFLOP"], rel=0.01)
    assert rows["released penalty, PyTorch"]["GFLOP"] is None
    assert (tmp_path / "report.md").is_file()


@pytest.mark.parametrize(
    "options", [{"batch": 7}, {"rank": -1}, {"repetitions": -1}, {"layers": 0}]
)
def test_sizes_that_are_none_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="at least"):
        curvature.main(curvature.Config(out=tmp_path, **options))
