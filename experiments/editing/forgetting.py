"""What Ilharco et al. (2023) measure of forgetting: accuracy on target and control.

In `[T, 2, ...]`, 2 are the task that is forgotten and the control.
"""

import numpy as np
from tqdm import tqdm

from experiments.common.vision import scores, setups
from jaxarith.typing import Numbers, Taus


def negation(setup: setups.Setup, taus: Taus) -> scores.Negation:
    """Subtracts each vector; the coefficient is the largest of 0, 0.05, …, 1 that keeps
    95 % of the control accuracy on validation data (B.1)."""
    return scores.negation(
        setup, taus, linearized=False, coefs=scores.COEFS, largest=True
    )


def models(setup: setups.Setup, taus: Taus) -> dict[str, tuple[np.ndarray, list]]:
    """By model, test accuracies `[T, 2]` in percent and the coefficients of its tasks:
    the pre-trained, the fine-tuned, and that with a vector subtracted."""
    found, none = negation(setup, taus), [None] * len(taus)
    tuned = curves(setup, taus, [1.0])[..., 0]
    return {
        "Pre-trained": (100 * found.accuracies[..., 0], none),
        "Fine-tuned": (100 * tuned, none),
        "Negative task vector": (100 * found.accuracies[..., 2], found.coefs),
    }


def curves(setup: setups.Setup, taus: Taus, coefs: Numbers) -> np.ndarray:
    """Test accuracies `[T, 2, n]` with each vector alone at every coefficient."""
    rows = np.asarray(coefs)[:, None]
    progress = tqdm(setup.tasks, desc="target and control", unit="task")
    found = []
    for task, tau in zip(progress, taus, strict=True):
        both = (task.test, setup.required_control.test)
        found.append([scores.accuracies(setup, [tau], x, False, rows) for x in both])
    return np.array(found)
