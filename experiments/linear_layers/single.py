"""Accuracies of the tasks' own models (Figures 3 and 6)."""

import numpy as np

from experiments import arithmetic, methods, vision

METHODS = {
    "Non-linear": "nonlinear",
    "NTK linearization": "linear",
    "Ours": "linear_layers_1",
}


def accuracies(setup: vision.Setup) -> dict[str, np.ndarray]:
    """Test accuracies of every method's single-task models, `[T]` in percent."""
    found = {}
    for label, method in METHODS.items():
        taus = methods.vectors(setup, method)
        linearized = methods.is_linearized(method)
        found[label] = 100 * np.array(
            [
                arithmetic.accuracies(setup, [tau], task.test, linearized, [[1.0]])[0]
                for task, tau in zip(setup.tasks, taus, strict=True)
            ]
        )
    return found
