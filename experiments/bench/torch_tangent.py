"""The same work in PyTorch, at its usual best in eager mode.

A model is called through `torch.func.functional_call`, its tangent is taken by
`torch.func.jvp`, and gradients run backwards through that, as the public code of
Ortiz-Jimenez et al. (2023) does. The τJp penalty takes a tangent pass of its own for
every task whose samples are in the step, as the public code of Yoshida et al. (2025)
does.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from jaxarith import layouts, tree


def tensors(values: tree.Tree, device: str, dtype) -> dict[str, torch.Tensor]:
    """A tree of JAX parameters under PyTorch's names and orientations."""
    leaves = {p: np.asarray(v, np.float32) for p, v in tree.flatten(values).items()}
    return {
        name: torch.tensor(np.ascontiguousarray(array), device=device, dtype=dtype)
        for name, array in layouts.to_torch(leaves).items()
    }


def features_of(config: dict, attention: str, device: str, dtype) -> Callable:
    """`features(params, *inputs)`, the inputs being those of `make_inputs`."""
    fields = {k: v for k, v in config.items() if k != "model_type"}
    if config["model_type"] == "t5":
        model = T5EncoderModel(T5Config(**fields, attn_implementation="eager"))
    else:
        options = CLIPVisionConfig(**fields, attn_implementation=attention)
        model = CLIPVisionModelWithProjection(options)
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def images(params, pixels):
        return torch.func.functional_call(model, params, (pixels,)).image_embeds

    def texts(params, input_ids, attention_mask):
        named = {"input_ids": input_ids, "attention_mask": attention_mask}
        output = torch.func.functional_call(model, params, (), named)
        real = attention_mask[..., None].to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * real).sum(1) / real.sum(1)

    return texts if config["model_type"] == "t5" else images


def inputs_of(arrays, config: dict, device: str, dtype) -> tuple:
    """Inputs in PyTorch's orientation: channels first."""
    if config["model_type"] == "t5":
        return tuple(torch.tensor(a, device=device, dtype=torch.long) for a in arrays)
    [images] = arrays
    images = np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2)))
    return (torch.tensor(images, device=device, dtype=dtype),)


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
    outputs, moved = jvp(features, params, tau, *inputs)
    total = loss(outputs + moved)
    for samples in penalties:
        _, disturbed = jvp(features, params, tau, *samples)
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


def steps(
    features: Callable,
    fused_features: Callable,
    params: dict,
    taus: list[dict],
    parts: dict[str, dict],
    inputs: tuple,
    penalties: dict[str, list[tuple]],
    loss: Callable,
    coef: float,
) -> dict[str, Callable]:
    """What is measured, by the names that the rows of `jvp_cost` have.

    Args:
      features: with attention that forward mode can differentiate.
      fused_features: with PyTorch's fused attention.
      params, taus: tensors by name.
      parts: the parts of a task vector that partial fine-tuning trains, by row.
      inputs: of the task that is trained.
      penalties: by row, the batches of other tasks.
      loss: of features.
      coef: of the penalty.
    """
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
        **{name: stepping([], part) for name, part in parts.items()},
        **{name: stepping(batches, taus[0]) for name, batches in penalties.items()},
        f"{len(taus)} JVPs": no_gradient(
            lambda: [jvp(features, params, tau, *inputs) for tau in taus]
        ),
    }
