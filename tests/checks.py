"""How tests compare what was computed with what is right."""

import jax
import numpy as np

from jaxarith import tree


def assert_close(actual, expected, tolerance=0.0, *, rtol=None, atol=None):
    """Trees of one structure, whose leaves differ by no more than a tolerance.

    Args:
      tolerance: relative and absolute tolerance; 0 asks for equal values.
      rtol, atol: either of them alone, in place of `tolerance`.
    """
    rtol = tolerance if rtol is None else rtol
    atol = tolerance if atol is None else atol
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = tree.flatten(actual)
    for path, leaf in tree.flatten(expected).items():
        np.testing.assert_allclose(
            leaves[path], leaf, rtol=rtol, atol=atol, err_msg=path
        )


def assert_same(actual, expected):
    """Trees of one structure, whose leaves have the same dtypes and values."""
    assert_close(actual, expected)
    leaves = tree.flatten(actual)
    for path, leaf in tree.flatten(expected).items():
        assert leaves[path].dtype == leaf.dtype, path


def assert_not_degenerate(outputs, least=0.05):
    """Finite outputs that differ along every axis by far more than any tolerance.

    A comparison of constants or zeros would pass whatever is computed.
    """
    outputs = np.asarray(outputs)
    assert np.isfinite(outputs).all()
    spread = [np.std(outputs, axis=axis).mean() for axis in range(outputs.ndim)]
    assert min(spread) > least, spread
