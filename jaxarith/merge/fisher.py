r"""Fisher merging: the mean of the models, weighted by their Fisher information.

Matena, Raffel. Merging Models with Fisher-Weighted Averaging. NeurIPS 2022.
arXiv:2111.09832.

.. math:: \theta^{(j)} = \frac{\sum_i \lambda_i F_i^{(j)} \theta_i^{(j)}}
                              {\sum_i \lambda_i F_i^{(j)}}, \qquad
          F_i = \mathbb{E}_x\, \mathbb{E}_{y\sim p(y|x,\theta_i)}
                \big(\nabla_\theta \log p(y|x,\theta_i)\big)^2

for every entry j. This is the mode of the product of the models' Gaussian posteriors,
if their precision matrices are diagonal.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import task_vectors, tree
from jaxarith.batches import mask_of
from jaxarith.merge import _leaves
from jaxarith.typing import ApplyFn, Coef, Params, Taus, Tree

Estimator = Literal["per_example", "batch_squared"]


def fisher(
    params_0: Params,
    taus: Taus,
    fishers: Sequence[Tree],
    *,
    weights: Coef = 1.0,
    normalize: bool = False,
    floor: float = 0.0,
) -> Params:
    r"""Returns the mean of the fine-tuned models, weighted by their Fisher information.

    Entries for which no model has information are averaged with `weights` only.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      fishers: for every task, the diagonal of its model's Fisher matrix; see
        `fisher_diagonal`. A missing leaf counts as zero.
      weights: the weight λ of every model: one number, one per task `[T]`, or either by
        path. Only their ratios matter.
      normalize: whether to divide each Fisher by its norm over all leaves, as the
        authors' code does. Then models with more confident outputs do not outweigh the
        others.
      floor: a number that is added to every entry and to the norm. FusionBench and
        MergeLM publish results with `normalize=True, floor=1e-6` and with their own
        estimator, `batch_squared`.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: a wrong number of Fishers or weights, a Fisher that does not fit, no
        task vector, one that does not fit, or non-finite values.

    Example:
      >>> taus = [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([3.0, 3.0])}]
      >>> fishers = [{"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([1.0, 0.0])}]
      >>> print(fisher({"w": jnp.zeros(2)}, taus, fishers)["w"])
      [1.5 2. ]
    """
    _leaves.check(params_0, taus)
    _leaves.one_each(fishers, len(taus), "Fishers")
    for i, of_task in enumerate(fishers):
        tree.check_part(of_task, params_0, f"Fisher {i}", "pre-trained parameters")
        tree.check_finite(of_task, f"Fisher {i}")
    factors = _leaves.task_coefs(weights, taus, "weights")
    scales = jnp.ones(len(taus))
    if normalize:
        scales = jnp.stack([_inverse(task_vectors.norm(f) + floor) for f in fishers])
    flat = [tree.flatten(of_task) for of_task in fishers]
    rows = {
        path: tuple(of_task.get(path, jnp.zeros(())) for of_task in flat)
        for path in tree.aligned(taus)
    }
    return _leaves.fold(_merge_leaf, params_0, taus, rows, factors, scales, floor)


@_leaves.leaf_function
def _merge_leaf(leaf_0, taus, fishers, weights, scales, floor):
    precisions = [
        weight * scale * (of_task.astype(leaf_0.dtype) + floor)
        for weight, scale, of_task in zip(weights, scales, fishers, strict=True)
    ]
    total = sum(precisions)
    plain = weights * _inverse(jnp.sum(weights))  # the shares without information
    # Shares are computed before products, so the share of a single task is exactly 1.
    shares = (
        jnp.where(total > 0, precision / jnp.where(total > 0, total, 1), share)
        for precision, share in zip(precisions, plain, strict=True)
    )
    return leaf_0 + sum(s * tau for s, tau in zip(shares, taus, strict=True))


def _inverse(x):
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def fisher_diagonal(
    apply_fn: ApplyFn,
    params: Params,
    batches: Sequence[dict],
    *,
    estimator: Estimator = "per_example",
    part: Tree | None = None,
    inputs: Sequence[str] = ("image",),
    samples: int | None = None,
    key: jax.Array | None = None,
    chunk: int = 4,
) -> Params:
    r"""Returns the diagonal of a classifier's Fisher matrix, from unlabelled data.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> logits[B, C]`.
      params: the parameters θ_i of the fine-tuned model.
      batches: dicts of arrays `[B, ...]`, as `data.pipeline.evaluation_batches` makes
        them. Rows whose `mask`, `bool[B]`, is False may hold any values; without a mask
        every row counts.
      estimator: "per_example" is the definition: the mean over samples of
        :math:`\sum_c p_c (\nabla\log p_c)^2`. "batch_squared" is the estimator of
        public tables (MergeLM, FusionBench). For each batch it squares the gradient of
        :math:`\sum_b\sum_c \sqrt{p_{bc}} \log p_{bc}`, with a constant root. The
        squares are summed over batches and divided by the number of samples. It has
        cross terms of samples and classes, so it is not the Fisher information, and it
        grows with the batch.
      part: a task vector, or any tree with the wanted leaves; by default all leaves.
      inputs: names of the fields of a batch that `apply_fn` takes, in order.
      samples: number of labels to draw from p for each sample. None sums over all C
        classes. Each label costs a backward pass per sample.
      key: random key of the draws. A draw depends only on it and the sample's place.
      chunk: number of samples that are differentiated at the same time, at most a whole
        batch. Each needs the memory of two or three copies of `part`.

    Returns:
      A tree like `part`, in float32 or better.

    Raises:
      ValueError: an unknown estimator, options that it does not have, draws without a
        key, a mask of another length, no real sample, or outputs that are not logits
        `[B, C]`.

    Example:
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> batch = {"image": jnp.array([[2.0]]), "mask": [True]}
      >>> print(fisher_diagonal(apply_fn, {"w": jnp.zeros((1, 2))}, [batch])["w"])
      [[1. 1.]]
    """
    _leaves.one_of(estimator, Estimator, "estimator")
    if samples is not None and (estimator != "per_example" or key is None):
        raise ValueError(
            "samples needs a key, and the per_example estimator, to draw labels; found "
            f"estimator {estimator!r} and key {key}."
        )
    if min(chunk, 1 if samples is None else samples) < 1:
        raise ValueError(
            f"chunk is {chunk} and samples is {samples}; both must be at least 1."
        )
    masks = [mask_of(batch) for batch in batches]
    count = sum(int(mask.sum()) for mask in masks)
    if not count:
        raise ValueError("the batches hold no real sample; give at least one.")
    part = tree.floating(params) if part is None else part
    tree.check_part(part, params)
    params = jax.device_put(params)  # moved to the device once, not with every batch
    start = tree.restrict(params, tree.flatten(part))
    total = jax.tree.map(_zeros, start)
    first = 0
    for batch, mask in zip(batches, masks, strict=True):
        values = tuple(jnp.asarray(batch[name]) for name in inputs)
        args = (total, start, params, values, jnp.asarray(mask))
        if not mask.any():
            pass  # no real sample could replace the padding
        elif estimator == "per_example":
            at_once = min(chunk, len(mask))
            total = _add_per_example(apply_fn, *args, first, key, samples, at_once)
        else:
            total = _add_batch_squared(apply_fn, *args)
        first += len(mask)
    return jax.tree.map(lambda leaf: leaf / count, total)


def _zeros(leaf):
    return jnp.zeros(jnp.shape(leaf), tree.wide_dtype(leaf))


def _logits(apply_fn, params, part, inputs):
    logits = apply_fn(tree.update(params, part), *inputs)
    if jnp.ndim(logits) != 2:
        raise ValueError(
            f"apply_fn returned outputs of shape {list(jnp.shape(logits))}; the Fisher "
            "information needs logits [B, C]. Compose the encoder with its head."
        )
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _add_squares(total, gradients, weight=1):
    def add(leaf, gradient):
        return leaf + jnp.asarray(weight, leaf.dtype) * gradient.astype(leaf.dtype) ** 2

    return jax.tree.map(add, total, gradients)


@functools.partial(
    jax.jit, static_argnames=("apply_fn", "samples", "chunk"), donate_argnames="total"
)
def _add_per_example(
    apply_fn, total, start, params, inputs, mask, first, key, samples, chunk
):
    def one(values, real, place):
        def logits_of(part):
            return _logits(apply_fn, params, part, [x[None] for x in values])[0]

        logits, pullback = jax.vjp(logits_of, start)
        p = jax.nn.softmax(logits)
        if samples is None:
            labels, weights = jnp.arange(len(p)), p
        else:
            place_key = jax.random.fold_in(key, place)
            labels = jax.random.categorical(place_key, logits, shape=(samples,))
            weights = jnp.full(samples, 1 / samples, p.dtype)

        def add_label(squares, label_and_weight):
            label, weight = label_and_weight
            # The gradient of log p_c with respect to the logits is e_c - p.
            (gradients,) = pullback(jax.nn.one_hot(label, len(p), dtype=p.dtype) - p)
            return _add_squares(squares, gradients, weight), None

        zeros = jax.tree.map(_zeros, start)
        return jax.lax.scan(add_label, zeros, (labels, real * weights))[0]

    def add_chunk(total, rows):
        squares = jax.vmap(one)(*rows)
        return jax.tree.map(lambda t, s: t + s.sum(0), total, squares), None

    # All chunks are whole; the last one is padded, as the batch is.
    count = -(-len(mask) // chunk) * chunk
    mask = jnp.pad(mask, (0, count - len(mask)))
    rows = [x[_real_rows(mask)] for x in inputs]
    *rows, real = (x.reshape(-1, chunk, *x.shape[1:]) for x in (*rows, mask))
    places = jnp.arange(count).reshape(-1, chunk)
    return jax.lax.scan(add_chunk, total, (tuple(rows), real, first + places))[0]


def _real_rows(mask):
    """Returns the indices of the samples; padding gets the index of a real sample.

    Padding does not count. But a network that normalises zeros may be NaN there, and
    its gradient would be 0 · NaN.
    """
    return jnp.where(mask, jnp.arange(len(mask)), jnp.argmax(mask))


@functools.partial(jax.jit, static_argnames="apply_fn", donate_argnames="total")
def _add_batch_squared(apply_fn, total, start, params, inputs, mask):
    inputs = [x[_real_rows(mask)] for x in inputs]

    def score(part):
        log_p = jax.nn.log_softmax(_logits(apply_fn, params, part, inputs))
        roots = jax.lax.stop_gradient(jnp.exp(log_p / 2))
        return jnp.sum(roots * log_p, where=mask[:, None])

    return _add_squares(total, jax.grad(score)(start))
