"""Accuracies of the tasks' own models (Figures 3 and 6)."""

import numpy as np

from experiments.common.vision import options, scores

METHODS = {
    "Non-linear": "nonlinear",
    "NTK linearization": "linear",
    "Ours": "linear_layers_1",
}


def accuracies(setup: options.Setup) -> dict[str, np.ndarray]:
    """Test accuracies of every method's single-task models, `[T]` in percent."""
    return {
        label: scores.single_accuracies(setup, method)[1]
        for label, method in METHODS.items()
    }
