"""The disentanglement error ξ of a pair of task vectors."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxarith.evaluate.outputs import OutputsAt
from jaxarith.typing import Numbers


def disentanglement_error(
    outputs_at: Sequence[OutputsAt],
    predict: Sequence[Callable[[np.ndarray], np.ndarray]],
    coefs: Numbers,
) -> np.ndarray:
    r"""The ξ grid of a pair of task vectors (Ortiz-Jimenez et al. 2023, section 4).

    .. math:: \xi(\alpha_1, \alpha_2) = \sum_{t=1,2} \Pr_{x\sim t}[
              f(x; \theta_0 + \alpha_t\tau_t) \neq
              f(x; \theta_0 + \alpha_1\tau_1 + \alpha_2\tau_2)]

    Args:
      outputs_at: for each of the two datasets, a function from `(α_1, α_2)` to outputs,
        made by `forward` or `tangent`. With `tangent` a call does not run the network.
      predict: for each dataset, a function from outputs `[N, ...]` to labels `[N]`.
      coefs: the values of α_1 and of α_2, `[n]`.

    Returns:
      `f64[n, n]` in [0, 2]: row i is α_1 = coefs[i], column j is α_2 = coefs[j].

    Raises:
      ValueError: there are not two datasets.
    """
    if len(outputs_at) != 2 or len(predict) != 2:
        raise ValueError(f"ξ compares two tasks; found {len(outputs_at)}.")
    first, second = outputs_at
    alone_1 = [predict[0](first((a, 0.0))) for a in coefs]
    alone_2 = [predict[1](second((0.0, b))) for b in coefs]

    def error(i, j):
        both = (coefs[i], coefs[j])
        return np.mean(predict[0](first(both)) != alone_1[i]) + np.mean(
            predict[1](second(both)) != alone_2[j]
        )

    indices = range(len(coefs))
    return np.array([[error(i, j) for j in indices] for i in indices])
