"""Measures forgetting as the editing paper does: accuracy on target and control.

In `[T, 2, ...]` the 2 are (target, control).
"""

import numpy as np
from tqdm import tqdm

from experiments.common.vision import scores, setups
from jaxarith.typing import Numbers, Taus


def negation(setup: setups.Setup, taus: Taus) -> scores.Negation:
    """Subtracts each vector, with the largest coefficient that keeps the control.

    Coefficients are 0, 0.05, …, 1; the control must keep 95 % of its accuracy on
    validation data (B.1).
    """
    return scores.negation(
        setup, taus, linearized=False, coefs=scores.COEFS, largest=True
    )


def models(setup: setups.Setup, taus: Taus) -> dict[str, tuple[np.ndarray, list]]:
    """Returns, by model, test accuracies `[T, 2]` in percent, and coefficients `[T]`.

    The models are the pre-trained and fine-tuned one, and one with a vector subtracted.
    """
    found, none = negation(setup, taus), [None] * len(taus)
    tuned = curves(setup, taus, [1.0])[..., 0]
    return {
        "Pre-trained": (100 * found.accuracies[..., 0], none),
        "Fine-tuned": (100 * tuned, none),
        "Negative task vector": (100 * found.accuracies[..., 2], found.coefs),
    }


def curves(setup: setups.Setup, taus: Taus, coefs: Numbers) -> np.ndarray:
    """Returns test accuracies `[T, 2, n]` of single vectors at n coefficients."""
    rows = np.asarray(coefs)[:, None]
    progress = tqdm(setup.tasks, desc="target and control", unit="task")
    found = []
    for task, tau in zip(progress, taus, strict=True):
        both = (task.test, setup.required_control.test)
        found.append([scores.accuracies(setup, [tau], x, False, rows) for x in both])
    return np.array(found)
