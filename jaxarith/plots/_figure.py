"""What all figures share: colours, and files that are whole or do not exist."""

import os
from pathlib import Path

from matplotlib.figure import Figure

# Distinct to colour-blind readers too (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
          "#999999")  # fmt: skip


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure as PNG under a temporary name and renames it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
