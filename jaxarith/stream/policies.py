"""Finds the tensor of a fine-tuned checkpoint for each tensor of the base.

Checkpoints of one model differ in harmless ways: a prefix of all names, tied tensors
that one file holds twice, buffers. These differences are reconciled and reported. Other
differences change the result: missing tensors, and vocabularies of different sizes.
They are errors unless a policy says what to do.
"""

import collections
import re
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from jaxarith import tree
from jaxarith.hub import Stored
from jaxarith.stream import names

Vocabulary: TypeAlias = Literal["error", "truncate", "base-rows", "skip"]
Missing: TypeAlias = Literal["error", "base"]
VOCABULARIES: tuple[Vocabulary, ...] = get_args(Vocabulary)
MISSING: tuple[Missing, ...] = get_args(Missing)

# Tensors with a row for every token: embeddings, and tensors tied or compared to them.
_TOKENS = re.compile(
    r"embed|wte|(^|\.)shared\.|lm_head|vocab|predictions|decoder\.(weight|bias)"
)
_POSITIONS = re.compile(r"position|wpe|patch|relative")
# Embeddings and heads. If two have equal values, they are one tensor with two names.
# Equal layers or norms are not: a copied layer is computed twice.
_HEADS = re.compile(r"proj_out|embed_out|shared_head|^output\.weight")
_NORMS = re.compile(r"norm|ln_|token_type", re.IGNORECASE)


def check(vocabulary: Vocabulary, missing: Missing, has_base: bool) -> None:
    """Raises a ValueError unless these policies are known and possible."""
    for name, value, known in (
        ("vocabulary", vocabulary, VOCABULARIES),
        ("missing", missing, MISSING),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known are {', '.join(known)}.")
    if not has_base and (missing == "base" or vocabulary in ("base-rows", "skip")):
        raise ValueError(
            "there is no base whose tensors could replace a model's tensors. Give a "
            'base, or choose missing="error" and vocabulary="error" or "truncate".'
        )


def fit(
    base: Mapping[str, Stored],
    model: Mapping[str, Stored],
    label: str,
    missing: Missing = "error",
) -> tuple[dict[str, Stored], list[str]]:
    """Finds the tensor of a model for each tensor of the base.

    Args:
      base, model: tensors by name.
      label: the name of the model in errors and notes.
      missing: what to do if a model lacks tensors, or has tensors that the base lacks.
        "error": refuse the model; "base": keep the tensors of the base, and leave out
        the others.

    Returns:
      The floating-point tensors by the base's names, and notes on what was done.

    Raises:
      ValueError: a tensor is missing, or has no place in the base.
    """
    of_base, notes = names.match(base, model, label)
    ours = {of_base[name]: tensor for name, tensor in model.items()}
    wanted = {name for name, tensor in base.items() if _is_merged(name, tensor)}
    found = {name: ours[name] for name in sorted(wanted) if name in ours}

    tied = {}
    for name in sorted(wanted - found.keys()):
        if not may_be_tied(name) or _is_constant(base[name]):  # like a bias of zeros
            continue
        others = filter(may_be_tied, found)
        twins = (other for other in others if same_values(base[name], base[other]))
        if (twin := next(twins, None)) is not None:
            tied[name] = found[twin]
            notes.append(f"{label}: {name} is tied to {twin}")
    found |= tied
    lacking = sorted(wanted - found.keys())

    extra = {name: t for name, t in ours.items() if name not in base}
    copies = {
        name: other
        for name, tensor in extra.items()
        for other in filter(may_be_tied, found)
        if may_be_tied(name) and same_values(tensor, found[other])
    }
    buffers = sorted(name for name, t in extra.items() if not _is_merged(name, t))
    notes += _of_the_base(base, ours, label)
    notes += [f"{label}: {a} is a copy of {b}" for a, b in sorted(copies.items())]
    strange = sorted(extra.keys() - copies.keys() - set(buffers))
    if missing == "error" and (lacking or strange):
        lines = [f"- {name} {base[name]}: not in the model" for name in lacking]
        lines += [f"+ {name} {ours[name]}: not in the base" for name in strange]
        raise ValueError(
            _listed(f"{label} does not fit the base ({_tensors(lines)}):", lines)
            + '\nTo keep the tensors of the base there, use missing="base" (--missing '
            "base, in `jaxarith merge` and `inspect`)."
        )
    if strange:
        _check_share(found, strange, ours, label)
    if lacking:
        notes.append(f"{label}: {_some(lacking)} missing: the base's are kept")
    if strange or buffers:
        notes.append(f"{label}: {_some([*strange, *buffers])} left out")
    notes += _wider(base, found, label)
    return dict(sorted(found.items())), notes


def _wider(base, found, label):
    """Returns a note on tensors whose dtype is less precise in the base."""
    wider = [n for n, x in found.items() if x.dtype.itemsize > base[n].dtype.itemsize]
    if not wider:
        return []
    pairs = sorted({f"{found[n].dtype}, {base[n].dtype} in the base" for n in wider})
    return [
        f"{label}: {_some(wider)} {'; '.join(pairs)}; the merge has the base's dtypes, "
        "unless a dtype is given (--dtype)"
    ]


def fit_vector(
    base: Mapping[str, Stored],
    vector: Mapping[str, Stored],
    label: str,
    missing: Missing = "error",
) -> tuple[dict[str, Stored], list[str]]:
    """Finds the tensor of the base for each tensor of a task vector.

    A task vector may cover only a part of the model, for example the image encoder. The
    other tensors of the base do not move, except those tied to a tensor that moves.

    Args:
      base, vector: tensors by name.
      label: the name of the task vector in errors and notes.
      missing: what to do with tensors that the base lacks. "error": refuse the vector;
        "base": leave them out.

    Returns:
      The tensors of the vector by the base's names, and notes on what was done.

    Raises:
      ValueError: a tensor has no place in the base, or another shape there.
    """
    of_base, notes = names.match(base, vector, label)
    ours = {of_base[name]: tensor for name, tensor in sorted(vector.items())}
    found = {
        name: tensor
        for name, tensor in ours.items()
        if name in base and base[name].is_floating and tensor.is_floating
    }
    strange = sorted(ours.keys() - found.keys())
    lines = [f"+ {name} {ours[name]}: no such weight in the base" for name in strange]
    lines *= missing == "error"
    lines += [
        f"! {name}: {list(tensor.shape)}, but {list(base[name].shape)} in the base"
        for name, tensor in found.items()
        if tensor.shape != base[name].shape
    ]
    if lines:
        raise ValueError(
            _listed(f"{label} does not fit the base ({_tensors(lines)}):", lines)
            + "\nGive the base that the task vector was trained from. To leave out "
            'tensors that the base lacks, use missing="base" (--missing base).'
        )
    if strange:
        _check_share(found, strange, ours, label)
        notes.append(f"{label}: {_some(strange)} left out")
    still = sorted(n for n, x in base.items() if _is_merged(n, x) and n not in found)
    for name in filter(may_be_tied, still):
        twins = (
            x for x in found if may_be_tied(x) and same_values(base[name], base[x])
        )
        if (twin := next(twins, None)) is not None and not _is_constant(base[name]):
            found[name] = found[twin]
            notes.append(f"{label}: {name} is tied to {twin} and moves with it")
    if rest := [name for name in still if name not in found]:
        notes.append(
            f"{label}: a task vector of {_tensors(found)}, without {_some(rest)} of "
            "the base, which do not move"
        )
    return found, notes


def _is_merged(name, tensor):
    return tensor.is_floating and not names.is_buffer(name, tensor)


def _of_the_base(
    base: Mapping[str, Stored], ours: Mapping[str, Stored], label: str
) -> list[str]:
    """Returns notes on tensors of the model that are not merged.

    Raises:
      ValueError: one is a matrix of integers whose values differ from the base's.
    """
    other = []
    for name in sorted(ours.keys() & base.keys()):
        tensor, of_base = ours[name], base[name]
        buffer = names.is_buffer(name, tensor)
        if _is_merged(name, of_base) or _same_bytes_and_kind(tensor, of_base):
            continue
        # Buffers are vectors and masks. Packed weights of a quantised model must be
        # refused: they would come from the base while their scales are merged.
        if tensor.dtype.kind in "iu" and len(tensor.shape) > 1 and not buffer:
            raise ValueError(
                f"{label}: {name} is a matrix of {tensor.dtype} that differs from the "
                "base's. Quantised models cannot be merged: convert them to a "
                "floating-point dtype first."
            )
        other.append(name)
    what = "buffers or integers that differ, where the base's are kept"
    return [f"{label}: {what}: {_some(other)}"] if other else []


def _check_share(found, strange, ours, label):
    """Raises a ValueError if most of a model's tensors have no place in the base."""
    lost = sum(ours[name].size for name in strange)
    size = lost + sum(tensor.size for tensor in found.values())
    if len(strange) > len(found) or 2 * lost > size:
        raise ValueError(
            f"{label} does not fit the base: {_some(strange)} have no place in it, "
            f'only {len(found)} do. missing="base" (--missing base) is for a few '
            "tensors that differ, such as heads. Give models of one base."
        )


def rows(
    base: Mapping[str, Stored],
    models: Mapping[str, Mapping[str, Stored]],
    vocabulary: Vocabulary = "error",
) -> tuple[dict[str, int], set[str], list[str]]:
    """Decides what to do with tensors whose numbers of rows differ.

    Args:
      base: tensors by name.
      models: the tensors of each model by the base's names; the models by label.
      vocabulary: which rows the merge has. "truncate": the rows that all models have.
        "base-rows": the rows of the base; rows that a model lacks do not move. "skip":
        the rows of the base, without merging them. "error": refuse the models.

    Returns:
      For each tensor that differs, the number of rows of the merge; the names of
      tensors that are not merged; and notes.

    Raises:
      ValueError: shapes differ in more than the number of tokens, or in that under
        "error".
    """
    counts: dict[str, dict[str, int]] = collections.defaultdict(dict)
    wrong = []
    for label, tensors in models.items():
        for name, tensor in tensors.items():
            if tensor.shape == base[name].shape:
                continue
            same_rest = tensor.shape[1:] == base[name].shape[1:]
            if tensor.shape and same_rest and is_of_tokens(name):
                counts[name][label] = tensor.shape[0]
            else:
                wrong.append(
                    f"! {name}: {list(tensor.shape)} in {label}, but "
                    f"{list(base[name].shape)} in the base"
                )
    if wrong:
        raise ValueError(
            _listed(f"{_tensors(wrong)} of other shapes:", wrong)
            + "\nGive models fine-tuned from one base; no others can be merged."
        )
    lines = [
        f"{name}: {base[name].shape[0]} rows in the base, but {count} in {label}"
        for name, of_label in counts.items()
        for label, count in of_label.items()
    ]
    if lines and vocabulary == "error":
        raise ValueError(
            _listed("the vocabularies differ:", lines)
            + '\nChoose vocabulary="truncate" for the rows that all models have, '
            '"base-rows" for the rows of the base, or "skip" for the base\'s rows '
            "without merging them (--vocabulary, in `jaxarith merge` and `inspect`)."
        )
    notes = [f"{line} ({vocabulary})" for line in lines]
    if vocabulary == "skip":
        return {}, set(counts), notes
    kept = {name: base[name].shape[0] for name in counts}
    if vocabulary == "truncate":
        kept = {name: min(n, *counts[name].values()) for name, n in kept.items()}
    return kept, set(), notes


def is_of_tokens(name: str) -> bool:
    """Whether the name of a tensor says that it has a row for every token."""
    return bool(_TOKENS.search(name) and not _POSITIONS.search(name))


def may_be_tied(name: str) -> bool:
    """Whether the name of a tensor says that it is an embedding or a head."""
    of_tokens = is_of_tokens(name) or _HEADS.search(name)
    return bool(of_tokens and not _NORMS.search(name))


def same_values(a: Stored, b: Stored) -> bool:
    """Whether two tensors are equal bit by bit; False for scalars."""
    if (a.dtype, a.shape) != (b.dtype, b.shape) or not a.shape:
        return False
    # Most tensors that differ do so in their first rows.
    few = min(16, a.shape[0])
    return _same_bytes(a.rows(few), b.rows(few)) and _same_bytes(a, b)


def _is_constant(tensor):
    entries = tensor.read().reshape(-1)
    return bool((entries == entries[:1]).all())


def _same_bytes_and_kind(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and _same_bytes(a, b)


def _same_bytes(a, b):
    return a.read().tobytes() == b.read().tobytes()


def _listed(title, lines):
    return "\n  ".join([title, *tree.first_few(lines)])


def _some(found):
    return f"{_tensors(found)} ({', '.join(tree.first_few(found, most=3))})"


def _tensors(found):
    return tree.counted(len(found), "tensor")
