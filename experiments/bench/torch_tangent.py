"""The same work in PyTorch, at its usual best in eager mode.

A model is called through `torch.func.functional_call`, its tangent is taken by
`torch.func.jvp`, and gradients run backwards through that, as the public code of
Ortiz-Jimenez et al. (2023) does. The τJp penalty takes a tangent pass of its own for
every task whose samples are in the step, as the public code of Yoshida et al. (2025)
does.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxarith import tree
from jaxarith.hub import layouts
from jaxarith.typing import Tree

# What T5Model calls its inputs, of which the other language models have the first two.
TEXTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


def tensors(values: Tree, device: str, dtype) -> dict[str, torch.Tensor]:
    """A tree of JAX parameters under PyTorch's names and orientations."""
    leaves = {p: np.asarray(v, np.float32) for p, v in tree.flatten(values).items()}
    return {
        name: torch.tensor(np.ascontiguousarray(array), device=device, dtype=dtype)
        for name, array in layouts.to_torch(leaves).items()
    }


def features_of(model: torch.nn.Module) -> Callable:
    """`features(params, *inputs)`, the inputs being what `inputs_of` gives."""

    def images(params, pixels):
        return torch.func.functional_call(model, params, (pixels,)).image_embeds

    def texts(params, *inputs):
        # GPT-2 with its head, whose names ours are, calls this model `transformer`.
        params = {k.removeprefix("transformer."): v for k, v in params.items()}
        named: dict[str, Any] = dict(zip(TEXTS, inputs, strict=False))
        hidden = torch.func.functional_call(model, params, (), named).last_hidden_state
        real = inputs[-1][..., None].to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)

    return images if model.main_input_name == "pixel_values" else texts


def model_of(config: dict, attention: str) -> torch.nn.Module:
    """Of transformers, from `encoders.Encoder.config`."""
    [architecture] = config["architectures"]
    cls = getattr(transformers, architecture)
    options = cls.config_class(**config, attn_implementation=attention)
    return cls(options).eval().requires_grad_(False)


def inputs_of(arrays, device: str, dtype) -> tuple:
    """Tokens and masks as they are; images with the channels first."""

    def tensor(array):
        if array.dtype == np.int32:
            return torch.tensor(np.asarray(array), device=device, dtype=torch.long)
        images = np.asarray(array, np.float32).transpose(0, 3, 1, 2)
        return torch.tensor(images.copy(), device=device, dtype=dtype)

    return tuple(map(tensor, arrays))


def gradient(loss: Callable, tau: dict) -> dict:
    """Of `loss(tau)` with leaves that require gradients."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in tau.items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def jvp(features: Callable, params: dict, tau: dict, *inputs):
    """Outputs and tangent in the direction of `tau`, a part of the parameters."""
    start = {name: params[name] for name in tau}
    function = lambda part: features({**params, **part}, *inputs)  # noqa: E731
    return torch.func.jvp(function, (start,), (tau,))


def linearized_loss(features, params, loss, inputs, penalties, coef, tau):
    """The loss of the linearised model, plus `coef` times the mean penalty."""
    outputs, moved, *_ = jvp(features, params, tau, *inputs)
    total = loss(outputs + moved)
    for samples in penalties:
        _, disturbed, *_ = jvp(features, params, tau, *samples)
        total = total + coef / len(penalties) * disturbed.norm(dim=-1).mean()
    return total


def no_gradient(function: Callable) -> Callable:
    """Runs `function` without recording, and waits for the accelerator."""

    def run():
        with torch.no_grad():
            return waited(function)

    return run


def waited(function: Callable):
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def steps(work, device: str, dtype: str, coef: float) -> dict[str, Callable]:
    """What is measured, by the names that the rows of `jvp_cost` have.

    The ordinary step has PyTorch's fused attention; a tangent has not, which forward
    mode cannot differentiate.

    Args:
      work: a `jvp_cost.Work`.
      device, dtype: as PyTorch calls them.
      coef: weight of the penalty.
    """
    kind: Any = getattr(torch, dtype)
    as_tensors = functools.partial(tensors, device=device, dtype=kind)
    features, fused_features = (
        features_of(model_of(work.encoder.config, attention).to(device, kind))
        for attention in ("eager", "sdpa")
    )
    params, inputs = as_tensors(work.params), inputs_of(work.inputs, device, kind)
    taus = [as_tensors(tau) for tau in work.taus]
    head = torch.tensor(np.asarray(work.head), device=device)
    labels = torch.tensor(np.asarray(work.labels), device=device, dtype=torch.long)

    def loss(features):
        features = torch.nn.functional.normalize(features.float(), dim=-1)
        return torch.nn.functional.cross_entropy(100 * features @ head.T, labels)

    def batches(name, arrays):
        # One batch per task: the strict penalty is a pass for each of them.
        count = len(taus) if "strict" in name else 1
        chunks = zip(*(jnp.split(array, count) for array in arrays), strict=True)
        return [inputs_of(chunk, device, kind) for chunk in chunks]

    linearized = functools.partial(linearized_loss, features, params, loss, inputs)

    def stepping(penalty_inputs, tau):
        total = functools.partial(linearized, penalty_inputs, coef)
        return functools.partial(waited, functools.partial(gradient, total, tau))

    def ordinary(params):
        return loss(fused_features(params, *inputs))

    return {
        "forward": no_gradient(lambda: fused_features(params, *inputs)),
        "ordinary step": functools.partial(
            waited, functools.partial(gradient, ordinary, params)
        ),
        "JVP": no_gradient(lambda: jvp(features, params, taus[0], *inputs)),
        "linearised step": stepping([], taus[0]),
        **{row: stepping([], as_tensors(part)) for row, part in work.parts.items()},
        **{
            row: stepping(batches(row, arrays), taus[0])
            for row, arrays in work.penalties.items()
        },
        f"{len(taus)} JVPs": no_gradient(
            lambda: [jvp(features, params, tau, *inputs) for tau in taus]
        ),
    }


def compare(ours: Mapping, theirs: Mapping, dtype: str) -> dict[str, float]:
    """The relative distance of the results of the two libraries, by row.

    Args:
      ours, theirs: functions by row. Rows that only one has are left out.
      dtype: dtype of the numbers, "float32" or another.

    Raises:
      ValueError: one is larger than rounding explains.
    """
    found = {}
    for name in ours:
        if name not in theirs:
            continue
        mine, other = ours[name](), theirs[name]()
        limit = 1e-4 if dtype == "float32" else 0.1
        if isinstance(other, dict):  # a gradient, by PyTorch's names
            leaves = {p: np.asarray(v) for p, v in tree.flatten(mine).items()}
            mine = layouts.to_torch(leaves)
            # A unit of T5's relu close to zero may be on either side of it.
            limit = max(limit, 1e-3)
            pairs = [(mine[key], value) for key, value in other.items()]
        else:
            pairs = list(zip(jax.tree.leaves(mine), _flat(other), strict=True))
        pairs = [
            (np.asarray(a, np.float32), b.detach().float().cpu().numpy())
            for a, b in pairs
        ]
        apart = np.sqrt(sum(np.sum((a - b) ** 2, dtype=float) for a, b in pairs))
        size = np.sqrt(sum(np.sum(b**2, dtype=float) for _, b in pairs))
        found[name] = float(apart / size)
        if not found[name] <= limit:
            raise ValueError(
                f"{name}: JAX and PyTorch are {found[name]:.2g} apart, relative to the "
                f"size of the result; at most {limit:g} was expected. They do not "
                "compute the same, so their times do not compare."
            )
    return found


def _flat(values):
    if isinstance(values, tuple | list):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]


def compared_steps(work, ours: Mapping, device: str, dtype: str, coef, compile: bool):
    """The functions to time by library and row, and how they compare with `ours`.

    Args:
      work, device, dtype, coef: as for `steps`.
      ours: JAX's functions by row; only these rows are returned.
      compile: whether to try `torch.compile` too, on every row.
    """
    theirs = {k: f for k, f in steps(work, device, dtype, coef).items() if k in ours}
    checks: dict[str, dict] = {"apart": compare(ours, theirs, dtype)}
    functions = {("torch", name): function for name, function in theirs.items()}
    tried = list(theirs) if compile else ()
    for name in sorted(tried):
        compiled = torch.compile(theirs[name])
        try:
            compare(ours, {name: compiled}, dtype)
            functions["torch.compile", name] = compiled
        except Exception as error:  # whatever the compiler of PyTorch raises
            lines = [line for line in str(error).splitlines() if line.strip()]
            checks.setdefault("torch.compile", {})[name] = lines[0][:300]
    return functions, checks
