"""One pass over samples that averages statistics of products with their Jacobians.

With a probe v, the Jacobian J of a sample yields the vector Jᵀv. `averages` computes it
for every sample by one backward pass, in the parts that factors need, and adds up.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxarith import sharding, tree
from jaxarith.batches import fields_of, mask_of
from jaxarith.curvature import layers as linear
from jaxarith.curvature import matrices, sketch
from jaxarith.curvature.matrices import Layer
from jaxarith.typing import ApplyFn, Params

# A function of `(basis, a, g, counted)`. It returns sums over samples, by name. a holds
# the inputs `[B, R, in (+ 1)]` of a layer, and g the gradients `[B, R, out]` in its
# outputs. `counted`, `bool[B, R]`, tells which tokens count. Other tokens are zero in a
# and g.
Statistics = Callable[[Any, jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]


class Plan(NamedTuple):
    """The options of a pass; hashable, so `jit` can take it as a static argument.

    Attributes:
      layers: the layers for which `statistics` are measured.
      statistics: function that computes the statistics of one layer.
      probes: number of random probes for each sample; None for one per direction.
      chunk: number of samples that are differentiated at the same time.
      full, diagonal: paths of other leaves that have a full block or a diagonal.
      tokens: pairs of a layer's name and the field of a batch that is true for tokens
        that count.
      penalty_mask: name of the field that is 0 for padding tokens of the features.
      rank: number of rows of the sketch of all leaves; 0 for no sketch.
    """

    layers: tuple[Layer, ...]
    statistics: Statistics
    probes: int | None
    chunk: int
    full: tuple[str, ...] = ()
    diagonal: tuple[str, ...] = ()
    tokens: tuple[tuple[str, str], ...] = ()
    penalty_mask: str | None = None
    rank: int = 0


def first_sample(batches: Sequence[dict], inputs: Sequence[str]) -> tuple:
    """Returns the inputs of the model for the first sample.

    Raises:
      ValueError: there is no batch, no batch has a row, or a field is missing.
    """
    if not len(batches):
        raise ValueError("found no batch to measure curvature on; give at least 1.")
    for batch in batches:
        values = fields_of(batch, inputs)
        if len(mask_of(batch)):
            return tuple(jnp.asarray(x)[:1] for x in values)
    raise ValueError("the batches hold no real sample; give at least one.")


def averages(
    apply_fn: ApplyFn,
    params_0: Params,
    batches: Sequence[dict],
    plan: Plan,
    inputs: Sequence[str],
    key: jax.Array | None,
    mesh: Mesh | None,
    bases: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns means over samples and probes.

    Args:
      apply_fn, params_0, batches, inputs, key, mesh: as for `curvature.collect`.
      plan: the options of the pass.
      bases: first argument of the statistics for each layer, by its name.

    Returns:
      `{"layers": {name: statistics}, "full": …, "diagonal": …, "sketch": …,
      "samples": N}`.
    """
    if plan.probes is not None and plan.probes < 1:
        raise ValueError(
            f"probes is {plan.probes}; it must be at least 1, or None for the exact "
            "sum."
        )
    if plan.probes is not None and key is None:
        raise ValueError(
            "random probes need a key; found None. Give key=jax.random.key(0)."
        )
    if plan.chunk < 1:
        raise ValueError(f"chunk is {plan.chunk}; it must be at least 1.")
    if plan.rank < 0:
        raise ValueError(
            f"rank is {plan.rank}; it must be at least 0, which means no sketch."
        )
    masks = [mask_of(batch) for batch in batches]
    count = sum(int(mask.sum()) for mask in masks)
    if not count:
        raise ValueError("the batches hold no real sample; give at least one.")
    mesh = sharding.for_tasks(mesh or sharding.mesh_of(params_0), 1)
    params_0 = sharding.shard(params_0, mesh)  # placed once, not with every batch
    fields = {field for _, field in plan.tokens}
    if plan.penalty_mask is not None:
        fields.add(plan.penalty_mask)
    key = jax.random.key(0) if key is None else key
    sums, rows_kept, place = None, None, 0
    for batch, mask in zip(batches, masks, strict=True):
        places = place + np.arange(len(mask))
        place += len(mask)
        if not mask.any():
            continue  # no real sample could replace the padding
        # Padding may hold any values, and NaN times zero is NaN.
        real = np.where(mask, np.arange(len(mask)), np.argmax(mask))
        values = tuple(np.asarray(x)[real] for x in fields_of(batch, inputs))
        own = {name: np.asarray(fields_of(batch, [name])[0]) for name in fields}
        rows = _in_chunks((values, own, mask, places), plan.chunk, mesh)
        try:
            found, rows_kept = _sums(
                apply_fn, plan, mesh, params_0, rows, key, bases, rows_kept
            )
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                "a linear layer is called inside nn.remat, nn.jit or nn.scan, and its "
                "values cannot leave them. Build the model without remat."
            ) from error
        sums = found if sums is None else _added(sums, found)
    means = jax.tree.map(lambda leaf: leaf / count, sums)
    rows_kept = jax.tree.map(lambda leaf: leaf / count**0.5, rows_kept)
    if not _all_finite((means, rows_kept)):
        raise ValueError(
            "the curvature has NaN or infinite values. Check the samples and the "
            "parameters for such values."
        )
    return {**means, "sketch": rows_kept, "samples": jnp.asarray(count, jnp.float32)}


@jax.jit
def _all_finite(arrays):
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(arrays)]))


@functools.partial(jax.jit, donate_argnums=0)
def _added(sums, found):
    return jax.tree.map(jnp.add, sums, found)


def _in_chunks(rows, chunk, mesh):
    """Reshapes `[B, ...]` to `[n, chunk, ...]`; each device has its own samples.

    The last chunk is filled with copies, for which the mask is False.
    """
    shards = sharding.batch_shards(mesh)
    size = len(rows[2])
    chunk = min(chunk, -(-size // shards)) * shards
    padding = -size % chunk

    def cut(leaf):
        leaf = np.asarray(leaf)
        filled = np.concatenate([leaf, np.repeat(leaf[-1:], padding, axis=0)])
        return filled.reshape(-1, chunk, *leaf.shape[1:])

    inputs, own, mask, places = rows
    mask = np.concatenate([mask, np.zeros(padding, bool)])
    return sharding.put(
        (
            tuple(map(cut, inputs)),
            {name: cut(value) for name, value in own.items()},
            mask.reshape(-1, chunk),
            cut(places),
        ),
        jax.sharding.NamedSharding(mesh, P(None, sharding.BATCH)),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(apply_fn, plan, mesh, params_0, rows, key, bases, kept):
    """Returns the sums over a batch, and the sketch `kept` with this batch added."""
    chunk = functools.partial(chunk_sums, apply_fn, plan, params_0, key, bases)
    first = jax.tree.map(lambda leaf: leaf[0], rows)
    shapes, of_rows = jax.eval_shape(chunk, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if kept is None:
        kept = {
            path: jnp.zeros((plan.rank, *leaf.shape[1:]), leaf.dtype)
            for path, leaf in of_rows.items()
        }

    def add(carried, part):
        total, kept = carried
        found, new = chunk(part)
        if plan.rank:
            kept = sketch.compress(sketch.joined(kept, new), plan.rank)
        return (jax.tree.map(jnp.add, total, found), kept), None

    found, _ = jax.lax.scan(add, (zeros, kept), rows)
    return sharding.constrain(found, mesh, P())


def chunk_sums(
    apply_fn: ApplyFn,
    plan: Plan,
    params_0: Params,
    key: jax.Array,
    bases: Mapping[str, Any] | None,
    rows: Any,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Returns sums over a chunk of samples, averaged over probes, and the products Jᵀv.

    The products, `[probes · chunk, ...]` by path, are divided by the root of the number
    of probes. They are computed only for a sketch.

    Args:
      apply_fn, plan, params_0, key, bases: as for `averages`.
      rows: inputs `[B, ...]`, other fields by name, the mask and the samples' places.
    """
    inputs, fields, mask, places = rows
    size = len(mask)
    leaves = tree.flatten(params_0)
    others = {path: leaves[path] for path in (*plan.full, *plan.diagonal)}
    wanted = {path for layer in plan.layers for path in layer.kernels}

    def one(taps, others, values):
        params = tree.update(params_0, others) if others else params_0
        features, seen = linear.tapped(
            apply_fn, params, [x[None] for x in values], taps
        )
        _check_features(features)
        return features[0], {p: c for p, c in seen.inputs.items() if p in wanted}

    shapes = jax.eval_shape(
        lambda p, x: linear.tapped(apply_fn, p, [v[None] for v in x])[1].outputs,
        params_0,
        jax.tree.map(lambda x: x[0], inputs),
    )
    taps = linear.taps_like({p: calls for p, calls in shapes.items() if p in wanted})
    # Each sample has its own copy, so one pullback returns the gradients of every one.
    own = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (size, *jnp.shape(leaf))), (taps, others)
    )
    features, pullback, seen = jax.vjp(
        lambda taps, others: jax.vmap(one)(taps, others, inputs), *own, has_aux=True
    )
    weights = _weights(plan, features, fields, mask)
    layer_inputs = {
        layer.name: _inputs(plan, layer, seen, leaves, fields, mask)
        for layer in plan.layers
    }

    def of_probe(number):
        found, of_others = pullback(
            _probe(plan, key, places, number, features, weights)
        )
        wide = {p: x.astype(tree.wide_dtype(x)) for p, x in of_others.items()}
        statistics, rows = {}, dict(wide) if plan.rank else {}
        for layer in plan.layers:
            g = _output_gradients(layer, found)
            a, counted = layer_inputs[layer.name]
            g = jnp.where(counted[..., None], g, 0).astype(a.dtype)
            basis = None if bases is None else bases[layer.name]
            statistics[layer.name] = plan.statistics(basis, a, g, counted)
            if plan.rank:
                moved = jnp.einsum("bri,bro->bio", a, g, precision="highest")
                as_leaves = functools.partial(matrices.leaves, layer, like=leaves)
                rows.update(jax.vmap(as_leaves)(moved))
        sums = {
            "layers": statistics,
            "full": {path: _block(wide[path]) for path in plan.full},
            "diagonal": {p: jnp.sum(wide[p] ** 2, axis=0) for p in plan.diagonal},
        }
        return sums, rows

    directions = math.prod(features.shape[1:])
    count = directions if plan.probes is None else plan.probes
    if count == 1:
        return of_probe(0)
    sums, rows = jax.lax.map(of_probe, jnp.arange(count))
    return (
        jax.tree.map(lambda leaf: leaf.mean(axis=0), sums),
        {p: leaf.reshape(-1, *leaf.shape[2:]) / count**0.5 for p, leaf in rows.items()},
    )


def _check_features(features):
    if not isinstance(features, jax.Array) or features.ndim < 2:
        raise ValueError(
            "apply_fn returned outputs that are not one array of features [B, ..., D]. "
            "Pass a function that returns only this array."
        )


def _weights(plan, features, fields, mask):
    """Returns the scale of probes, `[B, ..., 1]`, so that tokens are averaged.

    It is zero for padding, else the root of one divided by the number of tokens.
    """
    positions = features.shape[1:-1]
    counted = jnp.broadcast_to(
        mask.reshape(-1, *(1,) * len(positions)), (len(mask), *positions)
    )
    if plan.penalty_mask is not None:
        tokens = fields[plan.penalty_mask] != 0
        if tokens.shape != counted.shape:
            raise ValueError(
                f"the penalty mask {plan.penalty_mask!r} has shape "
                f"{list(tokens.shape)}; the features need {list(counted.shape)}."
            )
        counted = counted & tokens
    axes = tuple(range(1, counted.ndim))
    number = jnp.sum(counted, axis=axes, keepdims=True)
    share = jnp.where(counted, 1 / jnp.maximum(number, 1), 0)
    return jnp.sqrt(share.astype(jnp.result_type(features, jnp.float32)))[..., None]


def _probe(plan, key, places, number, features, weights):
    """Returns the cotangents of a chunk's features; the mean of v vᵀ is weights²."""
    shape = features.shape[1:]
    if plan.probes is None:
        size = math.prod(shape)
        one = jnp.zeros(size, weights.dtype).at[number].set(size**0.5)
        drawn = one.reshape(shape)[None]
    else:
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
        draw = functools.partial(jax.random.normal, shape=shape, dtype=weights.dtype)
        drawn = jax.vmap(lambda k: draw(jax.random.fold_in(k, number)))(keys)
    return (drawn * weights).astype(features.dtype)


def _inputs(plan, layer, seen, leaves, fields, mask):
    """Returns inputs `[B, R, in (+ 1)]` of all calls of a layer, and counted tokens."""
    dtype = tree.wide_dtype(leaves[layer.kernels[0]])
    field = dict(plan.tokens).get(layer.name)
    rows, counted = [], []
    for call in seen[layer.kernels[0]]:  # [B, 1, ..., in]
        x = call.reshape(len(mask), -1, call.shape[-1])
        real = jnp.broadcast_to(mask[:, None], x.shape[:2])
        if field is not None and call.ndim > 3:
            tokens = fields[field]
            if tokens.shape != real.shape:
                raise ValueError(
                    f"the input of {layer.name} has {x.shape[1]} tokens, but its token "
                    f"mask {field!r} has {tokens.shape[1]}. Let token_mask be a "
                    "function of the path."
                )
            real = real & (tokens != 0)
        if layer.biases:
            x = jnp.concatenate([x, jnp.ones((*x.shape[:2], 1), x.dtype)], axis=-1)
        rows.append(jnp.where(real[..., None], x, 0).astype(dtype))
        counted.append(real)
    return jnp.concatenate(rows, axis=1), jnp.concatenate(counted, axis=1)


def _output_gradients(layer, found):
    """Returns gradients `[B, R, out]` in the outputs of all calls, side by side."""

    def of_kernel(path):
        calls = [x.reshape(len(x), -1, x.shape[-1]) for x in found[path]]
        return jnp.concatenate(calls, axis=1)

    return jnp.concatenate([of_kernel(path) for path in layer.kernels], axis=-1)


def _block(gradients):
    """Returns the sum of u uᵀ over samples, `[n, n]`, for gradients `[B, ...]`."""
    rows = gradients.reshape(len(gradients), -1)
    return jnp.matmul(rows.T, rows, precision="highest")
