"""Finds the names and kinds of layers that a model's class has for a checkpoint.

An adapter names modules of a class. Files may have other names: transformers renames
the tensors that it reads, and joins or transposes some. If transformers is installed,
its class decides; otherwise names and shapes of tensors do.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxarith.hub import Stored, orientation
from jaxarith.stream import tying

# Two-dimensional weights outside linear layers, or in layers that PEFT cannot adapt:
# embeddings, routers, and experts, which transformers 5 holds in one parameter.
_NOT_LINEAR = re.compile(
    r".*\.experts\.\d+\..*|(.*\.)?(shared|wte|wpe|wtt|tok_embeddings|embed_in|"
    r"relative_attention\w*|codebook\w*|router|(mlp|moe|block_sparse_moe|feed_forward)"
    r"\.gate|(?!\w*(proj|out))\w*embed\w*)\.weight"
)
# The name of the trunk in models with a head, by `model_type`; old files leave it out.
_OUTER = {
    "gpt2": "transformer",
    "gpt_neo": "transformer",
    "gptj": "transformer",
    "bloom": "transformer",
    "falcon": "transformer",
    **{kind: kind for kind in ("bert", "roberta", "distilbert", "electra", "albert")},
}


class Layout(NamedTuple):
    """The place of a file's tensors in their model's class.

    Attributes:
      names: the name in the class for each name in the file, for tensors that are only
        renamed.
      linear: whether each weight of a linear layer is `[in, out]`, by name in the file.
      tied: further names of the same parameter, by name in the class.
    """

    names: dict[str, str]
    linear: dict[str, bool]
    tied: dict[str, list[str]]


def layout(
    folder: Path, config: Mapping[str, Any], base: Mapping[str, Stored]
) -> tuple[Layout, list[str]]:
    """Returns the layout of a checkpoint, and notes on how it was found.

    Args:
      folder: the checkpoint.
      config: the content of its `config.json`.
      base: the tensors of the checkpoint.
    """
    [architecture, *_] = config.get("architectures") or [""]
    if not architecture:
        return by_names(config, base), []
    try:
        import torch  # noqa: F401, transformers makes no models without it
        import transformers
    except ImportError:
        return by_names(config, base), [
            "transformers is not installed: layers are found by the names in the file, "
            "which must be those of the model's class"
        ]
    kind = getattr(transformers, architecture, None)
    try:
        return by_class(kind, folder, base), []
    except Exception as error:  # a configuration may cause any error
        few = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return by_names(config, base), [
            f"transformers cannot make {architecture} ({few}): layers are found by the "
            "names in the file, which must be those of the model's class"
        ]


def by_class(kind: Any, folder: Path, base: Mapping[str, Stored]) -> Layout:
    """Returns the layout from a class of transformers; its model takes no memory."""
    import torch
    import transformers
    from transformers import conversion_mapping, core_model_loading, pytorch_utils

    with _silent(transformers), torch.device("meta"):
        model = kind(transformers.AutoConfig.from_pretrained(folder))
        model.tie_weights()
    found = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [x for x in found if isinstance(x, core_model_loading.WeightRenaming)]
    converters = [x for x in found if isinstance(x, core_model_loading.WeightConverter)]
    state = model.state_dict()
    modules = dict(model.named_modules())
    names, linear = {}, {}
    for name, tensor in base.items():
        new, converter = core_model_loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if converter is not None or new not in state:
            continue
        if tuple(state[new].shape) != tensor.shape:
            continue
        names[name] = new
        module, _, last = new.rpartition(".")
        if last == "weight" and tensor.is_floating:
            # PyTorch's attention uses the weight of a subclass of Linear directly.
            if type(modules[module]) is torch.nn.Linear:
                linear[name] = False
            elif type(modules[module]) is pytorch_utils.Conv1D:
                linear[name] = True
    same: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    tied = {x: [y for y in group if y != x] for group in same.values() for x in group}
    return Layout(names, linear, {name: more for name, more in tied.items() if more})


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def by_names(config: Mapping[str, Any], base: Mapping[str, Stored]) -> Layout:
    """Returns the layout from the names and shapes of the tensors only."""
    known = orientation.known(base)
    turned = any(known.values())
    outer = _outer_name(config, base)
    tied = {}
    if (pair := tying.pair(base, config)) is not None:
        head = outer + pair.head if pair.head in base else pair.head
        tied = {outer + pair.embedding: [head], head: [outer + pair.embedding]}
    linear = {
        name: orientation.in_out(name, tensor.shape, known, turned)
        for name, tensor in base.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and min(tensor.shape) > 0
        and tensor.is_floating
        and not _NOT_LINEAR.fullmatch(name)
    }
    return Layout({name: outer + name for name in base}, linear, tied)


def _outer_name(config: Mapping[str, Any], base: Mapping[str, Stored]) -> str:
    """Returns the prefix that the class of a model with a head adds to a file's names.

    For example, files of OpenAI's GPT-2 contain `h.0.attn`, and their configuration
    names a class in which this is `transformer.h.0.attn`.
    """
    [architecture, *_] = config.get("architectures") or [""]
    outer = _OUTER.get(str(config.get("model_type")))
    is_trunk = architecture.endswith("Model") and "LMHead" not in architecture
    if outer is None or not architecture or is_trunk:
        return ""
    inside = any(name.startswith(f"{outer}.") for name in base)
    return "" if inside else f"{outer}."
