r"""LoRA: low-rank factors beside the kernels of a Flax Linen model.

.. math:: y = x W + \frac{\alpha}{r}\,(x A) B

The factors are leaves of the parameter tree: `lora_a` `[in, r]` and `lora_b`
`[r, out]` beside a `kernel` `[in, out]`. So everything that takes parameters takes
them: `train.fine_tune` trains them alone, `tangent.linearize` and the τJp penalty
differentiate in them alone, and a frozen kernel costs no tangent product and no
gradient product. A linearised step then costs as much as an ordinary step on all
weights (`experiments.bench.lora_flops`).

    params_0 = lora.init(key, model.params, rank=8, select=bert.BLOCK_LINEAR_WEIGHTS)
    apply_fn = lora.adapted(bert.mean_encoder(model.config), alpha=16)
    config = train.TrainConfig(trained=lora.FACTORS, linearized=True, weight_decay=0)
    taus = train.fine_tune(apply_fn, params_0, loss_fn, batches, config, names=names)
    weights = [
        lora.task_vector(params_0, tau, alpha=16, linearized=True) for tau in taus
    ]  # of the kernels: what every merge takes

At :math:`B_0 = 0`, where `init` starts, the linearised model is

.. math:: f_\text{lin} = f(x; W_0) + J_W(x; W_0)\,\tfrac{\alpha}{r} A_0\,dB

so that `A` has no gradient: `trained=lora.B_FACTORS` is the same model for less.

A model without Linen layers is adapted as a function of whole weights, which costs a
gradient of each kernel:

    lambda params, x: apply_fn(
        task_vectors.apply(params, lora.delta(params, alpha=16)), x
    )

Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022.
arXiv:2106.09685. Tang et al. Parameter-Efficient Multi-Task Model Fusion with Partial
Linearization. ICLR 2024. arXiv:2310.04742.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxarith import tangent, task_vectors, tree
from jaxarith.hub.lora import FACTOR_A, FACTOR_B
from jaxarith.merge.core import Factors
from jaxarith.typing import ApplyFn, Params

# Path patterns for `TrainConfig.trained` and `tree.select`.
FACTORS = rf"(.*/)?({FACTOR_A}|{FACTOR_B})"
B_FACTORS = rf"(.*/)?{FACTOR_B}"


def init(
    key: jax.Array, params: Params, *, rank: int, select: str = r"(.*/)?kernel"
) -> dict:
    """The parameters with a pair of factors beside each chosen kernel.

    As in PEFT, A is uniform within the inverse root of its inputs and B is zero, so the
    model starts as it was. The draw of a pair depends only on the key and its path.

    Args:
      key: random key.
      params: a nested dict, as Linen makes it.
      rank: rank r of every product.
      select: pattern of whole paths of kernels `[in, out]` of `nn.Dense` layers, such
        as `bert.BLOCK_LINEAR_WEIGHTS`.

    Returns:
      `params` and the factors, in the dtypes of the kernels, float32 at least.

    Raises:
      ValueError: no leaf matches, one that does is no kernel `[in, out]`, or the rank
        is below 1.

    Example:
      >>> params = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> jax.tree.map(jnp.shape, init(jax.random.key(0), params, rank=1))["fc"]
      {'bias': (2,), 'kernel': (3, 2), 'lora_a': (3, 1), 'lora_b': (1, 2)}
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; at least 1 is needed.")
    leaves = tree.flatten(params)
    for path, kernel in tree.flatten(tree.select(params, select)).items():
        if path.rpartition("/")[2] != "kernel" or jnp.ndim(kernel) != 2:
            raise ValueError(
                f"{path} has shape {list(jnp.shape(kernel))} and is no kernel "
                "[in, out] of a Dense layer. Choose others by select."
            )
        inputs, outputs = kernel.shape
        dtype = tree.wide_dtype(kernel)
        key_of = task_vectors.leaf_key(key, path)
        bound = inputs**-0.5
        a = jax.random.uniform(key_of, (inputs, rank), dtype, -bound, bound)
        leaves[_beside(path, FACTOR_A)] = a
        leaves[_beside(path, FACTOR_B)] = jnp.zeros((rank, outputs), dtype)
    return tree.unflatten(leaves)


def _beside(path, name):
    return "/".join((*path.split("/")[:-1], name))


def adapted(apply_fn: ApplyFn, *, alpha: float) -> ApplyFn:
    r"""The model with :math:`\frac{\alpha}{r}(x A) B` added to its Dense layers.

    A layer reads its factors where it reads its kernel. W + BA is never made.

    Args:
      apply_fn: `apply_fn(params, *inputs)` that calls Linen modules. They may use
        `nn.remat`. It must not be jitted itself: `jit` hides the layers.
      alpha: the scale α; the rank is that of the factors.

    Returns:
      `apply(params, *inputs)` for parameters with factors, as `init` gives them. Keep
      the function: a second one is compiled again.

    Raises:
      ValueError: when called, if there are no factors or no layer reads some of them.

    Example:
      >>> dense = nn.Dense(1, use_bias=False)
      >>> apply_fn = lambda params, x: dense.apply({"params": params}, x)
      >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
      >>> params |= {"lora_a": jnp.array([[1.0], [0.0]]), "lora_b": jnp.array([[5.0]])}
      >>> x = jnp.array([[1.0, 1.0]])
      >>> print(apply_fn(params, x), adapted(apply_fn, alpha=2)(params, x))
      [[3.]] [[13.]]
    """

    def apply(params, *inputs):
        layers: set[str] = set()
        with nn.intercept_methods(functools.partial(_add_product, alpha, layers)):
            outputs = apply_fn(params, *inputs)
        _check_all_read(_pairs(params), layers)
        return outputs

    return apply


def _add_product(alpha, layers, next_function, args, kwargs, context):
    outputs, layer = next_function(*args, **kwargs), context.module
    is_call = isinstance(layer, nn.Dense) and context.method_name == "__call__"
    if not (is_call and layer.has_variable("params", FACTOR_A)):
        return outputs
    layers.add("/".join(layer.path))
    x = args[0] if args else kwargs["inputs"]
    a, b = (layer.get_variable("params", name) for name in (FACTOR_A, FACTOR_B))
    scale = alpha / a.shape[-1]
    # As rows: XLA would first transpose operands with several row axes, see `layers`.
    x, a, b = (v.astype(outputs.dtype) for v in (x.reshape(-1, x.shape[-1]), a, b))
    dot = functools.partial(jnp.dot, precision=layer.precision)
    return outputs + dot(scale * dot(x, a), b).reshape(outputs.shape)


def _check_all_read(pairs, layers):
    if not pairs:
        raise ValueError("the parameters have no factors: make them with `lora.init`.")
    # A function may apply a module to its part of the tree: paths inside are shorter,
    # and that of a module which is a layer is empty.
    ends = {f"/{layer}".rstrip("/") for layer in layers}
    unread = [
        path for path in pairs if not any(f"/{path}".endswith(end) for end in ends)
    ]
    if unread:
        raise ValueError(
            f"no Dense layer of apply_fn reads the factors beside {len(unread)} "
            f"kernels, such as {', '.join(tree.first_few(unread, most=3))}. Let `init` "
            "select kernels of nn.Dense layers that apply_fn calls, and give it "
            "without a jit of its own, which would hide them."
        )


def _pairs(params) -> dict[str, tuple[Any, Any]]:
    """A and B by the path of their layer."""
    leaves = tree.flatten(params)
    return {
        path.removesuffix(FACTOR_A).removesuffix("/"): (
            a,
            leaves[_beside(path, FACTOR_B)],
        )
        for path, a in leaves.items()
        if path.rpartition("/")[2] == FACTOR_A
    }


def delta(params: Params, *, alpha: float) -> dict:
    r"""What the factors add to the kernels, :math:`\frac{\alpha}{r} A B`.

    Args:
      params: the factors, alone or among other leaves.
      alpha: the scale α.

    Returns:
      A task vector of the kernels of adapted layers, `[in, out]`.

    Example:
      >>> factors = {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[5.0]])}
      >>> print(delta(factors, alpha=2)["kernel"].T)
      [[10. 20.]]
    """
    return tree.unflatten(
        {
            f"{path}/kernel".lstrip("/"): jnp.dot(
                alpha / a.shape[-1] * a, b, precision="highest"
            )
            for path, (a, b) in _pairs(params).items()
        }
    )


def factors(params: Params, *, alpha: float) -> dict[str, Factors]:
    r"""The factors by the path of their kernel, as `merge.core` takes them.

    Args:
      params: the factors, alone or among other leaves.
      alpha: the scale α; :math:`\frac{\alpha}{r}` goes into A.

    Example:
      >>> params = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 3))}
      >>> jax.tree.map(jnp.shape, factors(params, alpha=2))
      {'kernel': Factors(a=(2, 1), b=(1, 3))}
    """
    return {
        f"{path}/kernel".lstrip("/"): Factors(alpha / a.shape[-1] * a, b)
        for path, (a, b) in _pairs(params).items()
    }


def from_factors(factors: Mapping[str, Factors]) -> dict:
    """Parameters of adapters, of α = rank, from the factors by the path of a kernel.

    Example:
      >>> pair = Factors(jnp.ones((2, 1)), jnp.ones((1, 3)))
      >>> jax.tree.map(jnp.shape, from_factors({"fc/kernel": pair}))
      {'fc': {'lora_a': (2, 1), 'lora_b': (1, 3)}}
    """
    leaves = {}
    for path, (a, b) in factors.items():
        leaves |= {_beside(path, FACTOR_A): a, _beside(path, FACTOR_B): b}
    return tree.unflatten(leaves)


def task_vector(
    params_0: Params, tau: Params, *, alpha: float, linearized: bool = False
) -> dict:
    r"""The task vector of the kernels that a task vector of the factors amounts to.

    .. math::
        \tfrac{\alpha}{r}\bigl((A_0 + dA)(B_0 + dB) - A_0 B_0\bigr)
        \quad\text{or linearised}\quad
        \tfrac{\alpha}{r}\bigl(A_0\,dB + dA\,B_0\bigr)

    The model without factors does with it what the adapted model did with `tau`: the
    network, or its linearisation. It is merged like any other task vector. Factors are
    not: the product of two sums is not the sum of two products.

    Args:
      params_0: parameters with factors at the start, as `init` gives them.
      tau: task vector of the factors; other leaves are left out.
      alpha: the scale α.
      linearized: whether `tau` was trained linearised.
    """
    product = functools.partial(delta, alpha=alpha)
    start = tree.select(params_0, FACTORS)
    tau = tree.select(tau, FACTORS)
    if linearized:
        return tangent.jvp(product, start, tau)[1]
    params = task_vectors.apply(start, tau)
    return task_vectors.difference(product(params), product(start))


def tangent_factors(params_0: Params, tau: Params) -> dict:
    r"""Factors whose product is what a linearised training found, for a PEFT folder.

    .. math::
        A_0 B_0 + A_0\,dB + dA\,B_0 =
        \begin{bmatrix} A_0 & dA \end{bmatrix}
        \begin{bmatrix} B_0 + dB \\ B_0 \end{bmatrix}

    Args:
      params_0: parameters with factors at the start.
      tau: task vector of the factors, trained linearised.

    Returns:
      Factors for the same α. Their rank is the same where :math:`B_0` is zero, as after
      `init`, and twice as large otherwise.
    """
    start, moved = tree.select(params_0, FACTORS), tree.select(tau, FACTORS)
    moves = _pairs(tree.fill(moved, start))
    pairs = _pairs(start)
    from_zero = not any(jnp.any(b != 0) for _, b in pairs.values())
    factors = {}
    for path, (a, b) in pairs.items():
        da, db = moves[path]
        if not from_zero:  # the scale α/r of twice the rank is half as large
            a = jnp.concatenate([a, da], axis=1)
            db = jnp.concatenate([2 * (b + db), 2 * b])
        factors[f"{path}/{FACTOR_A}".lstrip("/")] = a
        factors[f"{path}/{FACTOR_B}".lstrip("/")] = db
    return tree.unflatten(factors)
