"""What the tests of experiments have in common: a smoke run, and what it must hold."""

import importlib
import json

import numpy as np


def run(name: str, out, **options) -> dict:
    """Runs `experiments.<name>` as `--smoke`; checks what all scripts promise.

    `report.json` holds what is returned; its numbers are finite and not all the same; a
    figure has a picture and a table a report.
    """
    script = importlib.import_module(f"experiments.{name}")
    found = script.main(script.Config(smoke=True, out=out, **options))
    assert json.loads((out / "report.json").read_text()) == found
    numbers = plain_numbers(found)
    assert len(numbers) >= 3 and np.isfinite(numbers).all()
    assert len(set(numbers)) > 1  # not a table of zeros
    if name.split(".")[1].startswith("figure"):
        assert [file for file in out.glob("*.png") if file.stat().st_size > 5000]
    assert (out / "report.md").read_text().startswith("# ")
    return found


def plain_numbers(value) -> list:
    """All numbers in plain data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for child in value for x in plain_numbers(child)]
    return [value] if isinstance(value, int | float) else []
