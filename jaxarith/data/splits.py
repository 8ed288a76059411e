"""Makes the validation splits of the task-arithmetic papers without PyTorch."""

import numpy as np


def torch_permutation(n: int, seed: int = 0) -> np.ndarray:
    """Returns what `torch.randperm(n, generator=manual_seed(seed))` does on the CPU.

    PyTorch shuffles with raw 32-bit draws of the Mersenne Twister, which NumPy's legacy
    generator reproduces.

    Args:
      n: the length.
      seed: the seed.

    Returns:
      `i64[n]`, a permutation.

    Example:
      >>> int(torch_permutation(60000)[0])
      36044
    """
    draws = np.random.RandomState(seed).randint(2**32, size=max(n - 1, 0), dtype="u4")
    order = np.arange(n)
    for i, draw in enumerate(draws):
        j = i + int(draw) % (n - i)
        order[i], order[j] = order[j], order[i]
    return order


def train_validation(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the papers' train and validation parts of a training set.

    The validation part is a tenth, at most 5,000 samples (protocol of Ilharco et al.
    2023 and Ortiz-Jimenez et al. 2023).

    Args:
      n: the number of samples.

    Returns:
      `(train, validation)`, disjoint, together `0..n-1`.
    """
    order = torch_permutation(n)
    size = min(n // 10, 5000)
    return order[: n - size], order[n - size :]
