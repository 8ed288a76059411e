"""What every merge without data promises, method by method of `merge.METHODS`."""

import dataclasses
import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, assert_not_degenerate, assert_same
from flax import nnx
from oracles import normal

from jaxarith import merge, tree
from jaxarith.merge import methods

KEY = jax.random.key(5)
FREE = {
    name: method
    for name, method in merge.METHODS.items()
    if not method.data and method.returns == "params"
}
# One of each kind; the others run with the slow tests.
FAST = ("task_arithmetic", "ties", "dare", "iso_cts")
every_method = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in FREE
    ],
)
CLUSTERS = [[0, 2], [1]]  # what `bases` finds needs values, which `jit` does not know
LAYERS = ("first",)


def run(name, params_0, taus, **options):
    """The merge, with a key and clusters where it takes them."""
    method = FREE[name]
    if method.key:
        options["key"] = KEY
    if name == "bases":
        options["clusters"] = CLUSTERS
    return method.function(params_0, taus[: method.most], **options)


def linen(dtype=jnp.float32, seed=0):
    """Parameters of a Dense layer by the names of Linen."""
    shapes = {"first": (6, 5)}
    return {
        layer: {
            "kernel": jnp.asarray(normal((seed, i, 0), *shape), dtype),
            "bias": jnp.asarray(normal((seed, i, 1), shape[1]), dtype),
        }
        for i, (layer, shape) in enumerate(shapes.items())
    }


def vectors(dtype=jnp.float32):
    return [linen(dtype, seed) for seed in (1, 2, 3)]


@dataclasses.dataclass
class Dense:
    weight: Any
    bias: Any


jax.tree_util.register_dataclass(Dense, ["weight", "bias"], [])


def as_nnx(params):
    class MLP(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(6, 5, rngs=nnx.Rngs(0))

    state = nnx.split(MLP(), nnx.Param)[1]
    nnx.replace_by_pure_dict(state, params)
    return state


def from_nnx(state):
    return nnx.to_pure_dict(state)


def as_haiku(params):
    return {
        f"mlp/~/{layer}": {"w": own["kernel"], "b": own["bias"]}
        for layer, own in params.items()
    }


def from_haiku(params):
    return {
        name.rsplit("/", 1)[-1]: {"kernel": own["w"], "bias": own["b"]}
        for name, own in params.items()
    }


def as_dataclasses(params, layer_type=Dense):
    """Layers with the weights of PyTorch, [output, input], in a tuple."""
    return tuple(
        layer_type(params[layer]["kernel"].T, params[layer]["bias"]) for layer in LAYERS
    )


def from_dataclasses(layers):
    return {
        layer: {"kernel": own.weight.T, "bias": own.bias}
        for layer, own in zip(LAYERS, layers, strict=True)
    }


def as_equinox(params):
    equinox = pytest.importorskip("equinox", reason="equinox is not installed")

    class Layer(equinox.Module):
        weight: jax.Array
        bias: jax.Array

    return as_dataclasses(params, Layer)


def as_tuples(params):
    return tuple((params[layer]["kernel"], params[layer]["bias"]) for layer in LAYERS)


def from_tuples(layers):
    return {
        layer: {"kernel": kernel, "bias": bias}
        for layer, (kernel, bias) in zip(LAYERS, layers, strict=True)
    }


TREES = {
    "nnx": (as_nnx, from_nnx),
    "haiku": (as_haiku, from_haiku),
    "dataclass": (as_dataclasses, from_dataclasses),
    "equinox": (as_equinox, from_dataclasses),
    "tuple": (as_tuples, from_tuples),
}


def cases(axis, values, of_every_method):
    """Every method with some values; those of `FAST` with all: the rest is shared code.

    What differs by method are the values `of_every_method`.
    """
    pairs = [
        pytest.param(name, value, marks=() if name in FAST else pytest.mark.slow)
        for name in FREE
        for value in (values if name in FAST else of_every_method)
    ]
    return pytest.mark.parametrize(("name", axis), pairs)


# Matrices of the other orientation, and paths that do not name them.
@cases("kind", TREES, of_every_method=["dataclass", "tuple"])
def test_any_pytree_gives_the_same_as_the_names_of_linen(name, kind):
    there, back = TREES[kind]
    params_0, taus = linen(), vectors()
    own = there(params_0), [there(tau) for tau in taus]
    if FREE[name].key:  # draws are those of paths: what does not depend on them
        window = {"epsilon": 0.0} if name == "della" else {}
        merged = run(name, *own, drop_rate=0.0, **window)
        params = run(name, params_0, taus, drop_rate=0.0, **window)
    elif kind == "tuple" and name in ("iso_cts", "wudi", "esm", "ace"):
        with pytest.warns(UserWarning, match=f"{name} merges 0/0 as .output, inp"):
            run(name, *own)
        merged = run(name, *own, in_out=".*/0")
        params = run(name, params_0, taus)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = run(name, *own)
        params = run(name, params_0, taus)
    assert jax.tree.structure(merged) == jax.tree.structure(own[0])
    assert_close(back(merged), params, 1e-5)
    assert_not_degenerate(params["first"]["kernel"])
    with pytest.raises(AssertionError):
        assert_close(params, params_0, 1e-3)


@cases(
    *("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float64"]),
    of_every_method=["bfloat16", "float64"],
)
def test_dtypes_are_kept_and_sums_are_taken_in_float32_or_better(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        params_0, taus = linen(dtype), vectors(dtype)
        merged = run(name, params_0, taus)
        assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        widened = jax.tree.map(lambda x: x.astype(wide), (params_0, taus))
        expected = run(name, *widened)
        rounded = jax.tree.map(lambda x: x.astype(dtype).astype(wide), expected)
        found = jax.tree.map(lambda x: x.astype(wide), merged)
        # One rounding of the result, which may fall on the neighbour.
        step = float(jnp.finfo(dtype).eps) if dtype != "float64" else 1e-12
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=step, atol=1e-6),
            *(found, rounded),
        )


def at_three_tenths(function):
    """The ways in which JAX calls a function of a coefficient."""
    one = jnp.array([0.3])
    first = functools.partial(jax.tree.map, lambda x: x[0])
    return {
        "jit": lambda: jax.jit(function)(0.3),
        "scan": lambda: first(jax.lax.scan(lambda s, c: (s, function(c)), 0, one)[1]),
        "vmap": lambda: first(jax.vmap(function)(one)),
        "map": lambda: first(jax.lax.map(function, one)),
        "cond": lambda: jax.lax.cond(True, function, function, 0.3),
        "checkpoint": lambda: jax.checkpoint(function)(0.3),
    }


@pytest.mark.parametrize("name", FAST)
def test_every_transformation_gives_the_same(name):
    params_0, taus = linen(), vectors()

    def merged(coef, params_0=params_0, taus=taus):
        return run(name, params_0, taus, coef=coef)

    expected = merged(0.3)
    for call in at_three_tenths(merged).values():
        assert_close(call(), expected, 1e-5)

    def step(carry, coef):
        return carry, merged(coef, *carry)

    _, scanned = jax.lax.scan(step, (params_0, taus), jnp.array([0.3]))
    assert_close(jax.tree.map(lambda x: x[0], scanned), expected, 1e-5)


@every_method
def test_values_and_derivatives_of_several_coefficients_in_one_program(name):
    """The derivative by the coefficient is the merged vector."""
    params_0, taus, target = linen(), vectors(), linen(seed=4)

    def along_target(coef):
        merged = run(name, params_0, taus, coef=coef)
        return tree.gram([merged, target])[0, 1], merged

    program = jax.jit(jax.vmap(jax.grad(along_target, has_aux=True)))
    slopes, merged = program(jnp.array([0.3, 1.0, 0.0]))
    expected = run(name, params_0, taus, coef=0.3)
    assert_close(jax.tree.map(lambda x: x[0], merged), expected, 1e-5)
    move = jax.tree.map(lambda x: x[1] - x[2], merged)
    # A difference of parameters ten times as large as what is tested.
    np.testing.assert_allclose(slopes[0], tree.gram([move, target])[0, 1], rtol=1e-4)


@every_method
def test_coefficient_zero_is_the_pre_trained_model(name):
    params_0, taus = linen(), vectors()
    merged = run(name, params_0, taus, coef=0.0)
    if name == "cart":  # its coefficient is that of what it adds to the mean
        assert_close(merged, merge.average(params_0, taus), 1e-6)
    else:
        assert_same(merged, params_0)


@every_method
def test_running_statistics_are_averaged(name):
    params_0, taus = linen(), vectors()
    for i, owner in enumerate([params_0, *taus]):
        owner["norm"] = {"mean": jnp.full(4, float(i)), "var": jnp.full(4, 1.0 + i)}
    merged = run(name, params_0, taus)
    if name in ("slerp", "karcher"):  # means of models, in their way
        return
    count = len(taus[: FREE[name].most])
    mean = (1 + count) / 2
    if name == "wise_ft":
        mean = 1.0
    np.testing.assert_allclose(merged["norm"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(merged["norm"]["var"], 1 + mean + 1, rtol=1e-6)


@every_method
def test_complex_leaves_are_refused_by_name(name):
    params_0 = linen() | {"phase": jnp.ones(2, jnp.complex64)}
    taus = [tau | {"phase": jnp.ones(2, jnp.complex64)} for tau in vectors()]
    with pytest.raises(ValueError, match="phase is complex64"):
        run(name, params_0, taus)


def test_the_table_says_what_the_functions_take():
    with pytest.raises(TypeError):
        merge.METHODS["mine"] = merge.METHODS["ties"]  # pyright: ignore
    for name, method in merge.METHODS.items():
        assert method.function is getattr(merge, name)
        options = inspect.signature(method.function).parameters
        if method.coef is None:
            continue
        default = options["coef"].default
        assert default is None or default == method.coef, name
        assert method.search, name
        if method.key:
            assert "key" in options
    with pytest.raises(ValueError, match="2|two"):
        merge.slerp(linen(), vectors())


def test_the_guide_has_the_table_of_methods():
    guide = Path(merge.__file__).parents[1] / "docs" / "methods.md"
    assert methods.table() in guide.read_text(), "print(merge.methods.table())"
    assert methods.wrapper_table() in guide.read_text()
