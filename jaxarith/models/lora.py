r"""LoRA: low-rank factors beside the kernels of a Flax Linen model.

.. math:: y = x W + \frac{\alpha}{r}\,(x A) B

The factors are leaves of the parameter tree: `lora_a` `[in, r]` and `lora_b`
`[r, out]` beside a `kernel` `[in, out]`. So every function of parameters accepts them:
`train.fine_tune` trains only the factors, `tangent.linearize` and the τJp penalty
differentiate only with respect to the factors, and a frozen kernel costs no tangent
product and no gradient product. A linearised step then costs as much as an ordinary
step on all weights (`experiments.bench.lora_flops`).

    params_0 = lora.init(key, model.params, rank=8, select=bert.BLOCK_LINEAR_WEIGHTS)
    apply_fn = lora.adapted(bert.mean_encoder(model.config), alpha=16)
    config = train.TrainConfig(trained=lora.FACTORS, linearized=True, weight_decay=0)
    taus = train.fine_tune(apply_fn, params_0, loss_fn, batches, config, names=names)
    weights = [
        lora.task_vector(params_0, tau, alpha=16, linearized=True) for tau in taus
    ]  # task vectors of the kernels, which every merge takes

At :math:`B_0 = 0`, where `init` starts, the linearised model is

.. math:: f_\text{lin} = f(x; W_0) + J_W(x; W_0)\,\tfrac{\alpha}{r} A_0\,dB

so `A` has no gradient, and `trained=lora.B_FACTORS` gives the same model at less cost.

A model without Linen layers can be adapted as a function of whole weights. This costs
a gradient of each kernel:

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
    """Adds a pair of factors to the parameters beside each selected kernel.

    As in PEFT, B is zero, so the model is unchanged at first, and A is uniform between
    plus and minus the inverse square root of its number of inputs. The draw for a pair
    depends only on the key and the pair's path.

    Args:
      key: random key.
      params: a nested dict, as Linen makes it.
      rank: rank r of every product.
      select: pattern for the whole paths of kernels `[in, out]` of `nn.Dense` layers,
        such as `bert.BLOCK_LINEAR_WEIGHTS`.

    Returns:
      `params` with the factors, which have the dtypes of their kernels, or float32 if
      that is wider.

    Raises:
      ValueError: no leaf matches, a matching leaf is not a kernel `[in, out]`, or the
        rank is below 1.

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
                "[in, out] of a Dense layer. Select other leaves with `select`."
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
    r"""Adds :math:`\frac{\alpha}{r}(x A) B` to the outputs of a model's Dense layers.

    A layer reads its factors from beside its kernel. The sum of the kernel and the
    product is never formed.

    Args:
      apply_fn: `apply_fn(params, *inputs)`, which calls Linen modules. The modules may
        use `nn.remat`. Do not jit `apply_fn` itself: `jit` hides the layers.
      alpha: the scale α; the factors determine the rank.

    Returns:
      `apply(params, *inputs)` for parameters with factors, as `init` makes them. Keep
      this function: a second one would be compiled again.

    Raises:
      ValueError: on a call, the parameters have no factors, or no layer reads some of
        them.

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
    # As rows: XLA would first transpose operands with several row axes; see `layers`.
    x, a, b = (v.astype(outputs.dtype) for v in (x.reshape(-1, x.shape[-1]), a, b))
    dot = functools.partial(jnp.dot, precision=layer.precision)
    return outputs + dot(scale * dot(x, a), b).reshape(outputs.shape)


def _check_all_read(pairs, layers):
    if not pairs:
        raise ValueError("the parameters have no factors: make them with `lora.init`.")
    # A function may apply a module to only its part of the tree. Paths inside it are
    # then shorter; if the module itself is a layer, the path is empty.
    ends = {f"/{layer}".rstrip("/") for layer in layers}
    unread = [
        path for path in pairs if not any(f"/{path}".endswith(end) for end in ends)
    ]
    if unread:
        raise ValueError(
            f"no Dense layer of apply_fn reads the factors beside {len(unread)} "
            f"kernels, such as {', '.join(tree.first_few(unread, most=3))}. Let `init` "
            "select kernels of nn.Dense layers that apply_fn calls, and do not jit "
            "apply_fn itself, because jit hides its layers."
        )


def _pairs(params) -> dict[str, tuple[Any, Any]]:
    """Returns A and B by the path of their layer."""
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
    r"""Returns what the factors add to the kernels, :math:`\frac{\alpha}{r} A B`.

    Args:
      params: the factors, alone or among other leaves.
      alpha: the scale α.

    Returns:
      A task vector of the adapted layers' kernels, `[in, out]`.

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
    r"""Returns the factors by the path of their kernel, as `merge.core` takes them.

    Args:
      params: the factors, alone or among other leaves.
      alpha: the scale α; A is multiplied by :math:`\frac{\alpha}{r}`.

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
    """Makes adapter parameters, with α = rank, from factors by the path of a kernel.

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
    r"""Converts a task vector of the factors into a task vector of the kernels.

    .. math::
        \tfrac{\alpha}{r}\bigl((A_0 + dA)(B_0 + dB) - A_0 B_0\bigr)
        \quad\text{or linearised}\quad
        \tfrac{\alpha}{r}\bigl(A_0\,dB + dA\,B_0\bigr)

    With it, the model without factors (the network or its linearisation) computes what
    the adapted model computes with `tau`. It can be merged like any other task vector.
    Factors cannot: the product of two sums is not the sum of two products.

    Args:
      params_0: parameters at the start, with factors, as `init` makes them.
      tau: task vector of the factors; other leaves are ignored.
      alpha: the scale α.
      linearized: whether `tau` was trained with the linearised model.
    """
    product = functools.partial(delta, alpha=alpha)
    start = tree.select(params_0, FACTORS)
    tau = tree.select(tau, FACTORS)
    if linearized:
        return tangent.jvp(product, start, tau)[1]
    params = task_vectors.apply(start, tau)
    return task_vectors.difference(product(params), product(start))


def tangent_factors(params_0: Params, tau: Params) -> dict:
    r"""Returns factors whose product is the result of linearised training, for PEFT.

    .. math::
        A_0 B_0 + A_0\,dB + dA\,B_0 =
        \begin{bmatrix} A_0 & dA \end{bmatrix}
        \begin{bmatrix} B_0 + dB \\ B_0 \end{bmatrix}

    They can be written to a PEFT folder.

    Args:
      params_0: parameters at the start, with factors.
      tau: task vector of the factors, trained with the linearised model.

    Returns:
      Factors for the same α. Their rank is unchanged if :math:`B_0` is zero, as after
      `init`, and twice as large otherwise.
    """
    start, moved = tree.select(params_0, FACTORS), tree.select(tau, FACTORS)
    moves = _pairs(tree.fill(moved, start))
    pairs = _pairs(start)
    from_zero = not any(jnp.any(b != 0) for _, b in pairs.values())
    factors = {}
    for path, (a, b) in pairs.items():
        da, db = moves[path]
        if not from_zero:  # doubling the rank halves the scale α/r
            a = jnp.concatenate([a, da], axis=1)
            db = jnp.concatenate([2 * (b + db), 2 * b])
        factors[f"{path}/{FACTOR_A}".lstrip("/")] = a
        factors[f"{path}/{FACTOR_B}".lstrip("/")] = db
    return tree.unflatten(factors)
