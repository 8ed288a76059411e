"""What tables of task negation have in common: their rows and their report."""

from collections.abc import Mapping
from pathlib import Path

from experiments.common import tables
from experiments.common.vision import scores, setups


def rows(setup: setups.Setup, found: Mapping[str, scores.Negation]) -> list[dict]:
    """The rows of one model: pre-trained, and each method at 1 and as searched.

    Args:
      setup: the model.
      found: by the name of each method what `scores.negation` gives.
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
    """Writes the rows beside the published ones; returns what `report.json` holds."""
    return tables.compared(
        out,
        title,
        "Mean test accuracy on the task that is subtracted, to be low, and on the "
        "control, percent. Kept is 95 % of the pre-trained test accuracy; coefficients "
        "are chosen by that of validation data.",
        rows,
        published,
        keys=["model", "method", "coefficient", "control kept"],
        published_keys=["model", "method", "coefficient"],
        values=["target", "control"],
    )
