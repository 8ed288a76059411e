"""Small trees of parameters for the tests of mergekit's methods."""

import numpy as np
from oracles import normal

SHAPES = {
    "a.matrix": (6, 10),
    "c.conv": (3, 4, 2, 2),
    "d.one": (1,),
    "f.none": (0, 3),
}


def leaves(seed, scale=1.0):
    return {path: scale * normal((seed, *s), *s) for path, s in SHAPES.items()}


def task_vectors(count):
    return [leaves(10 + i, scale=1 + i) for i in range(count)]


def zeros():
    return {path: np.zeros(shape) for path, shape in SHAPES.items()}


def assert_merged(actual, expected, rtol=1e-10):
    assert actual.keys() == SHAPES.keys()
    for path, shape in SHAPES.items():
        assert actual[path].shape == shape
        np.testing.assert_allclose(
            actual[path], expected(path), rtol=rtol, atol=rtol, err_msg=path
        )
