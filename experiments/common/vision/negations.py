"""Rows and report shared by all tables of task negation."""

from collections.abc import Mapping
from pathlib import Path

from experiments.common import tables
from experiments.common.vision import scores, setups


def rows(setup: setups.Setup, found: Mapping[str, scores.Negation]) -> list[dict]:
    """Returns the rows of one model: pre-trained, then each method.

    A method has two rows, for coefficient 1 and for the searched coefficient.

    Args:
      setup: the model.
      found: dict from the name of a method to the result of `scores.negation`.
    """

    def row(method, coef, pair, kept=True, coefs=None):
        return {
            "model": setup.title,
            "method": method,
            "coefficient": coef,
            "target": pair[0],
            "control": pair[1],
            "control kept": "yes" if kept else "no",
            "coefs": coefs,
        }

    first = next(iter(found.values()))
    made = [row("Pre-trained", "", first.pretrained)]
    for method, result in found.items():
        ones = [1.0] * len(result.coefs)
        made.append(row(method, "1.0", result.at_one, result.kept[0], ones))
        searched = (result.searched, result.kept[1], result.coefs)
        made.append(row(method, "searched", *searched))
    return made


def report(out: Path, title: str, rows: list[dict], published: Mapping) -> dict:
    """Writes the rows beside the published ones; returns the report.json."""
    return tables.compared(
        out,
        title,
        "Mean test accuracy in percent on the target, which is subtracted and should "
        'be low, and on the control. The control is "kept" at 95 % of its pre-trained '
        "test accuracy or more; validation accuracy chooses the coefficients.",
        rows,
        published,
        keys=["model", "method", "coefficient", "control kept"],
        published_keys=["model", "method", "coefficient"],
        values=["target", "control"],
    )
