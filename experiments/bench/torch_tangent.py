"""The same work in PyTorch, at its usual best in eager mode.

A model is called through `torch.func.functional_call`, its tangent is taken by
`torch.func.jvp`, and gradients run backwards through that, as the public code of
Ortiz-Jimenez et al. (2023) does. The τJp penalty takes a tangent pass of its own for
every task whose samples are in the step, as the public code of Yoshida et al. (2025)
does.
"""

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch._dynamo
import transformers

from experiments.bench import jvp_rows, jvp_steps, measure
from experiments.bench.jvp_steps import MANY, linearized_part, ordinary_part
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
        # Our names are those of models with a head, which call this model so.
        params = {
            name.removeprefix("transformer.").removeprefix("bert."): leaf
            for name, leaf in params.items()
        }
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
      work: a `jvp_steps.Work`.
      device, dtype: as PyTorch calls them.
      coef: weight of the penalty.
    """
    torch.backends.cudnn.allow_tf32 = False  # which would round images to 10 bits
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
        count = jvp_steps.TASKS if "strict" in name else 1
        chunks = zip(*(jnp.split(array, count) for array in arrays), strict=True)
        return [inputs_of(chunk, device, kind) for chunk in chunks]

    linearized = functools.partial(linearized_loss, features, params, loss, inputs)

    def stepping(penalty_inputs, tau):
        total = functools.partial(linearized, penalty_inputs, coef)
        return functools.partial(waited, functools.partial(gradient, total, tau))

    def ordinary(part):
        return loss(fused_features({**params, **part}, *inputs))

    def ordinary_of(part):
        return functools.partial(waited, functools.partial(gradient, ordinary, part))

    def selected(values, pattern):
        return as_tensors(tree.select(values, pattern))

    rows = {
        "forward": no_gradient(lambda: fused_features(params, *inputs)),
        "ordinary step": ordinary_of(params),
        "JVP": no_gradient(lambda: jvp(features, params, taus[0], *inputs)),
        "linearised step": stepping([], taus[0]),
        **{
            linearized_part(name): stepping([], selected(work.taus[0], pattern))
            for name, pattern in work.parts.items()
        },
        **{
            ordinary_part(name): ordinary_of(selected(work.params, pattern))
            for name, pattern in work.parts.items()
        },
        **{
            row: stepping(batches(row, arrays), taus[0])
            for row, arrays in work.penalties.items()
        },
    }
    if len(taus) > 1:
        rows[MANY[1]] = no_gradient(
            lambda: [jvp(features, params, tau, *inputs) for tau in taus]
        )
    return rows


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


def device_of(name: str) -> str:
    """What PyTorch calls the device that JAX calls "cpu" or "gpu"."""
    return "cuda" if name == "gpu" else name


def peak_bytes(function: Callable) -> int | None:
    """What a call needs beyond what it starts with and what it returns.

    On a GPU PyTorch counts it. On a CPU it is the highest mark of the process's
    memory; None where the system does not tell that (only Linux does).
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        peak = torch.cuda.max_memory_allocated() - before
        return max(peak - sum(leaf.nbytes for leaf in jax.tree.leaves(result)), 0)
    if not Path("/proc/self/clear_refs").exists():
        return None
    _, peak, held = measure.peak_memory(function)
    return max(peak - held, 0)


def compared_rows(
    theirs: Mapping[str, Callable], ours: Mapping[str, Callable], dtype: str, compile
) -> tuple[dict[str, jvp_rows.Theirs], dict[str, dict]]:
    """PyTorch's rows, eager and compiled, and how they compare with `ours`.

    Args:
      theirs: what `steps` returned.
      ours: JAX's functions by row; only these rows are returned.
      dtype: dtype of the numbers.
      compile: whether to try `torch.compile` too, on every row.

    Returns:
      The rows; and by kind of check, what was found of each row: "apart" for eager
      mode, "torch.compile" for the error of a row that does not compile.

    Raises:
      ValueError: the results of eager mode are not ours.
    """
    _no_silent_fallback()
    found: dict[str, jvp_rows.Theirs] = {}
    checks: dict[str, dict] = {"apart": {}}
    for name in ours:
        if name not in theirs:
            continue
        checks["apart"] |= compare({name: ours[name]}, theirs, dtype)
        compiled, took = None, None
        if compile:
            compiled = torch.compile(theirs[name], dynamic=False)
            try:
                begin = time.perf_counter()
                compiled()
                took = time.perf_counter() - begin
                compare(ours, {name: compiled}, dtype)
            except Exception as error:  # whatever the compiler of PyTorch raises
                lines = [line for line in str(error).splitlines() if line.strip()]
                said = (lines or [type(error).__name__])[0][:300]
                checks.setdefault("torch.compile", {})[name] = said
                compiled, took = None, None
        found[name] = jvp_rows.Theirs(theirs[name], compiled, took, peak_bytes)
    return found, checks


def _no_silent_fallback():
    # All rows share code. Beyond the usual limit of programs of one function PyTorch
    # runs it in eager mode and does not say so.
    torch._dynamo.reset()
    for name, value in (
        ("recompile_limit", 256),
        ("accumulated_recompile_limit", 4096),
        ("fail_on_recompile_limit_hit", True),
    ):
        if hasattr(torch._dynamo.config, name):  # versions differ
            setattr(torch._dynamo.config, name, value)
