r"""ESM: merges in the subspaces of the outputs that the tasks change most.

Li, Qi, Tian, Geng. Model Merging in the Essential Subspace. CVPR 2026.
arXiv:2602.20208, and arXiv:2606.19164.

Let X be the inputs of a linear layer [output, input] in the model of task t, and
:math:`G_t = X^\top X / n` their Gram matrix. The task displaces the outputs by
:math:`X \tau_t^\top`. The principal directions of this displacement, without centring,
are the eigenvectors of :math:`\tau_t G_t \tau_t^\top`. The top :math:`k = \lfloor
\text{outputs}/T \rfloor` are the columns of :math:`P_t`. Without inputs, :math:`G_t =
1`, and they are the left singular vectors of :math:`\tau_t`. Then

.. math:: A_t = P_t^\top \tau_t, \qquad
          \tau = \beta\, [P_1 \dots P_T]_\perp
                 \begin{bmatrix} A_1 \\ \vdots \\ A_T \end{bmatrix}_\perp,

where ⊥ sets all singular values that are not zero to one value. Polarised scaling
multiplies every :math:`A_t`, then every column of A, and finally the layer (the factor
β). The factor is the square of the norm divided by the mean norm, where the mean is
over the tasks, the columns, or the layers of one kind. Layers are of one kind if their
paths differ only in the number of the block. Other leaves are averaged.

The equations of the paper set all singular values to 1. Then vectors of full rank have
the same norm in all layers of a kind, so β = 1, and the length of the task vectors is
lost. The authors' code uses the mean of the singular values, which is the default here.

The authors' code also does the following; none of it is done here. It multiplies the
vectors by the eigenvalues to the power 0.15 before ⊥, and the product by 2. It uses the
norm of :math:`A_t` before it is cut to k rows. It merges the output projection of
attention by TSV-Merge. For RoBERTa it does not scale tasks and columns.
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

    For one task vector without scaling, the result equals that of Iso-C, and no
    multiple of it is nearer to the task vector. For the sum of 1, 2 and 8 random
    matrices, 64 × 64, with and without scaling, the nearest multiple is 0.80 to 1.02
    times the result with `coef=1`. The factor 2 of the authors' code would halve this
    number.

    Gradients treat the directions as constants.

    A direction is dropped if its displacement of outputs is zero up to rounding. That
    holds for all directions beyond the number of inputs. In float32 the limit is 0.1%
    of the largest displacement. The authors' code uses unit vectors instead.

    With scaling, every matrix is merged twice; the first merge measures its norm.

    Args:
      params_0: pre-trained parameters.
      taus: T task vectors. A missing leaf counts as zero.
      grams: for every task, the mean of x xᵀ over the inputs of its model's linear
        layers: `[in, in]` by path, as for `regmean`. See `capture.input_grams`; in the
        paper 32 samples are enough. A matrix without Gram matrices uses the directions
        of its singular vectors. None does so for all matrices.
      coef: the coefficient α of the merged vector: one number, or one by path. The
        authors choose it on validation data.
      scaling: whether to use polarised scaling. It makes the vector longer if a few
        tasks, columns or layers have most of the length.
      singular_values: new value of the singular values of P and A: "mean", their mean,
        as in the authors' code, or "one", as in the equations of the paper.
      matrices: a regular expression for the whole paths of the 2-D leaves that are
        weights of linear layers; by default those without `embed` in their path. The
        others are averaged, and so are matrices with fewer outputs than tasks. None
        takes all 2-D leaves.
      in_out: a regular expression for the whole paths of matrices that are stored as
        [input, output]; the others are [output, input]. None decides by the last name
        of a path: `kernel` and `w` (Flax, Haiku) are [input, output]; `weight` and
        `embedding` (PyTorch, Equinox) are [output, input]. It warns about other names.

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
    """Returns the norm of a merged matrix before the layer is scaled."""
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
    """Returns the merged vector of matrices [output, input]."""
    outputs, inputs = taus[0].shape
    # There are at most as many directions as inputs; more rows of P and A would be 0.
    rank = min(outputs // len(taus), inputs)

    def decomposed(args):
        p = directions(*args)[:, :rank]
        return p.T, _matrices.dot(p.T, args[0])

    # One task at a time, so that memory holds the workspace of one decomposition.
    args = (jnp.stack(taus), jnp.stack(grams)) if grams else (jnp.stack(taus),)
    p, a = jax.lax.map(decomposed, args)
    if scaling:
        a *= _squares(jnp.sum(a**2, axis=(1, 2), keepdims=True))
        a *= _squares(jnp.sum(a**2, axis=(0, 1), keepdims=True))
    p, a = (_levelled(x.reshape(-1, x.shape[-1]), singular_values) for x in (p, a))
    return _matrices.dot(p.T, a)


def directions(tau: jax.Array, gram: jax.Array | None = None) -> jax.Array:
    """Returns the principal directions in which a task displaces a layer's outputs.

    They are the right singular vectors of x @ tau.T, for inputs x `[n, in]`. Gradients
    treat them as constants.

    Args:
      tau: the task vector of the layer, `[out, in]`.
      gram: x.T @ x / n, `[in, in]`; by default the identity.

    Returns:
      Unit vectors as columns, the largest displacement first: `[out, out]`, or without
      a Gram matrix `[out, min(out, in)]`. A direction whose displacement is zero up to
      rounding is zero.
    """
    fixed = jax.lax.stop_gradient(tau)
    if gram is None:
        return _matrices.svd(fixed)[0]
    # In float64 if JAX has it on: the condition number of Gram matrices is often above
    # 1e6.
    dtype = jnp.promote_types(fixed.dtype, jnp.result_type(float))
    fixed, gram = fixed.astype(dtype), jax.lax.stop_gradient(gram).astype(dtype)
    displaced = _matrices.dot(_matrices.dot(fixed, gram), fixed.T)
    values, vectors = jnp.linalg.eigh(displaced)
    kept = values > 16 * jnp.finfo(dtype).eps * values[-1]
    return (vectors * kept[None])[:, ::-1].astype(tau.dtype)


def _squares(squares):
    """Returns squares of norms in units of the mean norm, from the squared norms."""
    norms = tree.safe_sqrt(squares)
    return relative(norms, jnp.mean(norms)) ** 2


def _levelled(matrix, singular_values):
    """Returns the matrix with one value for all singular values that are not zero."""
    u, s, vt = _matrices.svd(matrix)
    level = mean_of_nonzero(s) if singular_values == "mean" else 1
    return level * _matrices.dot(u, vt)
