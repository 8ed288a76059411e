"""Matches names of tensors between two checkpoints, and recognises buffers."""

import collections
import re
from collections.abc import Iterable, Mapping

from jaxarith import tree
from jaxarith.hub import Stored

# Different spellings of one name; both checkpoints' names are changed to the second.
_SPELLINGS = tuple(
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        # Google's BERT files use TensorFlow's names for norms.
        (r"(?i)(norm\w*)\.gamma$", r"\1.weight"),
        (r"(?i)(norm\w*)\.beta$", r"\1.bias"),
        # torch.nn.utils.weight_norm has an old form, and a new one as parametrization.
        (r"\.parametrizations\.(\w+)\.original0$", r".\1_g"),
        (r"\.parametrizations\.(\w+)\.original1$", r".\1_v"),
        # A language model may be inside one of images and text: language_model.model
        # or model.language_model, depending on the version of transformers.
        (r"^(model\.|language_model\.)+", ""),
    )
)
_BUFFER = re.compile(
    r"(.*\.)?(position_ids|masked_bias|(\w+_)?inv_freq|relative_position_index|"
    r"(cos|sin)_cached|attention_mask|causal_mask)"
)
_MASK = re.compile(r"(.*\.)?(attn|attention|self)\.bias")


def is_buffer(name: str, tensor: Stored) -> bool:
    """Whether a tensor is computed by the model's class rather than trained."""
    # A causal mask may have any dtype. Its name may also be that of a bias, but a bias
    # is a vector.
    is_mask = _MASK.fullmatch(name) and len(tensor.shape) != 1
    return bool(is_mask or _BUFFER.fullmatch(name))


def match(
    base: Iterable[str], model: Iterable[str], label: str
) -> tuple[dict[str, str], list[str]]:
    """Finds the base's names for a model's tensors; names that the base lacks stay.

    Args:
      base, model: the names of the tensors of the base and of the model.
      label: the name of the model in notes.

    Returns:
      The base's name for each name of the model, and notes on names that differ.
    """
    base, model = set(base), list(model)
    if base.issuperset(model):
        return {name: name for name in model}, []
    as_they_are = _fitted({n: n for n in base}, {n: n for n in model})
    fixed = base.intersection(model)
    spelled = _fitted(_spelled(base, fixed), _spelled(model, fixed))
    # The names stay as they are unless more of them fit in another spelling.
    found, prefix = max(
        (as_they_are, spelled), key=lambda x: len(base.intersection(x[0].values()))
    )
    notes = []
    if prefix:
        notes.append(f"{label}: the names differ from the base's by {prefix!r}")
    other = [
        f"{name} is {now}"
        for name, now in sorted(found.items())
        if now not in (name, prefix[1:] + name) and name != prefix[1:] + now
    ]
    if other:
        few = "; ".join(tree.first_few(other, most=2))
        are = tree.counted(len(other), "name is", "names are")
        notes.append(f"{label}: {are} spelled differently: {few}")
    return found, notes


def _fitted(
    base: Mapping[str, str], model: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Returns the base's names by the model's after respelling, and their prefix."""
    renamed, prefix = _without_prefix(set(base.values()), model)
    back = {spelled: name for name, spelled in base.items()}
    return {name: back.get(renamed[name], name) for name in model}, prefix


def _spelled(names: Iterable[str], fixed: set[str]) -> dict[str, str]:
    """Returns the names in one spelling; a name that would become another's stays."""
    spelled = {}
    for name in names:
        new = name
        for pattern, spelling in _SPELLINGS:
            new = new if name in fixed else pattern.sub(spelling, new)
        spelled[name] = new
    counts = collections.Counter(spelled.values())
    return {n: new if counts[new] == 1 else n for n, new in spelled.items()}


def _without_prefix(
    base: set[str], model: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Returns the base's name for each of the model's, and the prefix that differs.

    Depending on the class and version that saved a file, `vision_model.`,
    `transformer.` or `bert.` is in front of all names, of all but the head's, or of
    none.
    """
    # Only prefixes of many names are tried, so none if names have no dots.
    heads = {
        f"{head}."
        for names in (base, model.values())
        for head, _ in collections.Counter(
            name.split(".")[0] for name in names
        ).most_common(8)
    }
    renamings = {"": dict(model)}
    for prefix in sorted(heads):
        renamings["+" + prefix] = {
            n: prefix + s if s not in base and prefix + s in base else s
            for n, s in model.items()
        }
        renamings["-" + prefix] = {
            n: _removed(s, prefix, base) for n, s in model.items()
        }

    # The names stay as they are unless more of them fit with another prefix. No two may
    # become the same.
    def fitting(sign):
        return len(base.intersection(renamings[sign].values()))

    def apart(sign):
        return len({*renamings[sign].values()}) == len(model)

    best = max(filter(apart, renamings), key=fitting)
    return renamings[best], best


def _removed(name, prefix, base):
    short = name.removeprefix(prefix)
    return short if name not in base and short in base else name
