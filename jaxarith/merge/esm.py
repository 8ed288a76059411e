r"""ESM: merging in the subspaces of the outputs that the tasks change most.

Li, Qi, Tian, Geng. Model Merging in the Essential Subspace. CVPR 2026.
arXiv:2602.20208, and arXiv:2606.19164.

With the inputs X of a linear layer [output, input] in the model of task t, the
principal directions of the displacement of its outputs, :math:`X \tau_t^\top`, not
centred, are the eigenvectors of :math:`\tau_t G_t \tau_t^\top` with the Gram matrix
:math:`G_t = X^\top X / n`. The top :math:`k = \lfloor \text{outputs}/T \rfloor` are the
columns of :math:`P_t`. Without inputs they are the left singular vectors of
:math:`\tau_t`, which is :math:`G_t = 1`. Then

.. math:: A_t = P_t^\top \tau_t, \qquad
          \tau = \beta\, [P_1 \dots P_T]_\perp
                 \begin{bmatrix} A_1 \\ \vdots \\ A_T \end{bmatrix}_\perp,

where ⊥ sets all singular values but those that are zero to one value. Polarised scaling
multiplies every :math:`A_t`, then every column of A, and at last the layer, by β, with
the square of its norm over the mean norm: of the tasks, the columns, and the layers of
a kind, whose paths differ in the number of the block alone. Other leaves are averaged.

The equations of the paper have 1 for all singular values. Then vectors of full rank
have the same norm in all layers of a kind, so that β = 1, and the length of the task
vectors is lost. The authors' code has their mean, which is the default here.

That code also multiplies the vectors by powers of 0.15 of the eigenvalues before ⊥,
and the product by 2; has the norm of :math:`A_t` before it is cut to k rows; and takes
the output projection of attention by TSV-Merge. For RoBERTa it does without the scaling
of tasks and columns. None of that is done here.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxarith import tree
from jaxarith.merge import _blas, _grams, _leaves, _matrices
from jaxarith.merge.iso_c import mean_of_nonzero
from jaxarith.merge.polarize import layer_scales, relative
from jaxarith.typing import Coef, Params, Taus

SingularValues = Literal["mean", "one"]


def esm(
    params_0: Params,
    taus: Taus,
    grams: Sequence[Mapping[str, jax.Array]] | None = None,
    *,
    coef: Coef = 1.0,
    scaling: bool = True,
    singular_values: SingularValues = "mean",
    matrices: str | None = _matrices.NO_EMBEDDING,
    in_out: str | None = None,
) -> Params:
    """Merges task vectors by ESM, with or without data.

    One task vector without scaling becomes the one that Iso-C makes of it, and no
    multiple of that is nearer to the task vector. For the sum of 1, 2 and 8 random
    matrices, 64 × 64, with and without scaling, the nearest multiple is 0.80 to 1.02
    times what `coef=1` gives. The factor 2 of the authors' code would halve that.

    Gradients take the directions as constants.

    A direction is dropped where the displacement of outputs is zero to rounding, such
    as those beyond the number of inputs. In float32 that is what is below 0.1% of the
    largest displacement. The authors' code has unit vectors in their place.

    With scaling every matrix is merged twice, the first time for its norm.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A leaf that one lacks counts as zero.
      grams: for every task, the mean of x xᵀ over the inputs of its model's linear
        layers: `[in, in]` by path, as for `regmean`. See `capture.input_grams`; 32
        samples are enough in the paper. A matrix for which no task has one gets the
        directions of its singular vectors, as do all if this is None.
      coef: the coefficient α of the merged vector, which the authors choose on
        validation data: one number, or one by path.
      scaling: whether to do the polarised scaling. It makes the vector longer where few
        tasks, columns or layers have most of the length.
      singular_values: what those of P and A become: "mean", their mean, as in the
        authors' code, or "one", as in the equations of the paper.
      matrices: a regular expression of the paths of the 2-D leaves that are weights of
        linear layers: by default those with no `embed` in their path. The others are
        averaged, as are matrices with fewer outputs than tasks. None is all 2-D leaves.
      in_out: a regular expression of the paths of matrices that are stored as [input,
        output]; the others are taken as [output, input]. None goes by the last name of
        a path: `kernel` and `w` are [input, output], as in Flax and Haiku, `weight` and
        `embedding` [output, input], as in PyTorch and Equinox; of others it warns.

    Returns:
      Parameters with the structure and dtypes of `params_0`.

    Raises:
      ValueError: an unknown `singular_values`, Gram matrices that do not fit or that
        only some tasks have, `matrices` matches none of the 2-D leaves, several
        coefficients, no task vector, one that does not fit, or non-finite values.

    Example:
      >>> a, b = jnp.diag(jnp.array([2.0, 0])), jnp.diag(jnp.array([1.0, 2]))
      >>> params_0, taus = {"kernel": jnp.zeros((2, 2))}, [{"kernel": a}, {"kernel": b}]
      >>> print(esm(params_0, taus, scaling=False)["kernel"])
      [[2. 0.]
       [0. 2.]]
    """
    _leaves.one_of(singular_values, SingularValues, "singular_values")
    _leaves.check(params_0, taus)
    rows = tree.aligned(taus)
    are_matrices = _matrices.which(rows, matrices)
    are_in_out = _matrices.which_in_out(are_matrices, in_out, "esm")
    inputs = dict.fromkeys(rows, ())
    if grams is not None:
        inputs = _grams.aligned(
            params_0, taus, grams, lambda path: are_in_out.get(path, True)
        )
    shapes = {path: row[0].shape for path, row in _leaves.unmapped(rows).items()}
    are_layers = {
        path: is_matrix and shapes[path][are_in_out[path]] >= len(taus)
        for path, is_matrix in are_matrices.items()
    }
    options = {"scaling": scaling, "singular_values": singular_values}
    scales = dict.fromkeys(rows)
    if scaling:
        scales = layer_scales(
            {
                path: _norm(rows[path], inputs[path], are_in_out[path], **options)
                if is_layer
                else None
                for path, is_layer in are_layers.items()
            }
        )
    return _leaves.fold(
        _merge_leaf,
        params_0,
        taus,
        inputs,
        scales,
        _leaves.vector_coef(coef, taus),
        are_layers,
        are_in_out,
        **options,
    )


@_leaves.leaf_function(
    static=("is_layer", "is_in_out", "scaling", "singular_values"), whole=True
)
def _merge_leaf(
    leaf_0, taus, grams, scale, coef, is_layer, is_in_out, scaling, singular_values
):
    if not is_layer:
        return leaf_0 + coef * (sum(taus) / len(taus))
    merged = _merged(taus, grams, is_in_out, scaling, singular_values)
    return leaf_0 + coef * (merged if scale is None else scale * merged)


def _norm(row, grams, is_in_out, scaling, singular_values):
    """The norm of a merged matrix before the layer is scaled."""
    row, grams = tree.gathered((row, grams))
    with _blas.limited(row):
        return tree.settled(_norm_of(row, grams, is_in_out, scaling, singular_values))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _norm_of(row, grams, is_in_out, scaling, singular_values):
    taus = [_leaves.widened(tau) for tau in row]
    merged = _merged(taus, grams, is_in_out, scaling, singular_values)
    return tree.safe_sqrt(jnp.sum(merged**2))


def _merged(taus, grams, is_in_out, scaling, singular_values):
    merge = functools.partial(
        _merge_matrices, grams=grams, scaling=scaling, singular_values=singular_values
    )
    return _matrices.as_out_in(merge, taus, is_in_out)


def _merge_matrices(taus, grams, scaling, singular_values):
    """The merged vector of matrices [output, input]."""
    outputs, inputs = taus[0].shape
    # There are no more directions than inputs: the rest of P and A would be zero.
    rank = min(outputs // len(taus), inputs)

    def decomposed(args):
        p = directions(*args)[:, :rank]
        return p.T, _matrices.dot(p.T, args[0])

    # One task at a time, so that there is the workspace of one decomposition.
    args = (jnp.stack(taus), jnp.stack(grams)) if grams else (jnp.stack(taus),)
    p, a = jax.lax.map(decomposed, args)
    if scaling:
        a *= _squares(jnp.sum(a**2, axis=(1, 2), keepdims=True))
        a *= _squares(jnp.sum(a**2, axis=(0, 1), keepdims=True))
    p, a = (_levelled(x.reshape(-1, x.shape[-1]), singular_values) for x in (p, a))
    return _matrices.dot(p.T, a)


def directions(tau: jax.Array, gram: jax.Array | None = None) -> jax.Array:
    """Principal directions of the displacement of a layer's outputs, constants.

    They are the right singular vectors of x @ tau.T, for inputs x `[n, in]`.

    Args:
      tau: the task vector of the layer `[out, in]`.
      gram: x.T @ x / n, `[in, in]`; by default the identity.

    Returns:
      Unit vectors as columns, the largest displacement first: `[out, out]`, or without
      a Gram matrix `[out, min(out, in)]`. Where there is no displacement to rounding
      they are zero.
    """
    fixed = jax.lax.stop_gradient(tau)
    if gram is None:
        return _matrices.svd(fixed)[0]
    # In float64 where that is on: the condition of Gram matrices is often past 1e6.
    dtype = jnp.promote_types(fixed.dtype, jnp.result_type(float))
    fixed, gram = fixed.astype(dtype), jax.lax.stop_gradient(gram).astype(dtype)
    displaced = _matrices.dot(_matrices.dot(fixed, gram), fixed.T)
    values, vectors = jnp.linalg.eigh(displaced)
    kept = values > 16 * jnp.finfo(dtype).eps * values[-1]
    return (vectors * kept[None])[:, ::-1].astype(tau.dtype)


def _squares(squares):
    """The squares of norms in units of the mean norm, from the squared norms."""
    norms = tree.safe_sqrt(squares)
    return relative(norms, jnp.mean(norms)) ** 2


def _levelled(matrix, singular_values):
    """The matrix with one value for all its singular values that are not zero."""
    u, s, vt = _matrices.svd(matrix)
    level = mean_of_nonzero(s) if singular_values == "mean" else 1
    return level * _matrices.dot(u, vt)
