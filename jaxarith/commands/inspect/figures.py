"""Measures checkpoints and task vectors for `jaxarith inspect`, as plain data."""

import collections
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from jaxarith import fingerprint, hub, stream, tree
from jaxarith.hub import Stored, lora
from jaxarith.hub.stored import short
from jaxarith.stream import policies

_CHUNK = 2**18  # entries that are widened at a time
_LARGEST = 5


class _Measured(NamedTuple):
    norm: float | None  # of the finite entries; None if they are no floats
    not_finite: int
    nbytes: int
    fingerprint: tuple


def checkpoint(model: str) -> dict[str, Any]:
    """Reads a checkpoint once, and returns facts about it as plain data.

    Args:
      model: a folder, the id of a model on the Hub, or a file of a task vector.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ValueError: a file is corrupt, or the model is an adapter, which needs a base.
    """
    folder, file, stored = _opened(model)
    stored = {name: stored[name] for name in sorted(stored, key=_in_order)}
    measured = {
        name: _measured(leaf.read())
        for name, leaf in tqdm(stored.items(), model, unit="tensor", leave=False)
    }
    table = [
        {
            "name": name,
            "dtype": short(leaf.dtype),
            "shape": list(leaf.shape),
            "bytes": measured[name].nbytes,
            "norm": measured[name].norm,
            "not_finite": measured[name].not_finite,
            "fingerprint": measured[name].fingerprint[2],
        }
        for name, leaf in stored.items()
    ]
    dtypes = collections.Counter()
    for leaf in stored.values():
        dtypes[short(leaf.dtype)] += leaf.size
    of_index = file.name.endswith(".index.json")
    files = sorted(set(hub.shards(file).values())) if of_index else [file]
    norms = {name: m.norm for name, m in measured.items() if m.norm is not None}
    return {
        "model": model,
        "folder": str(folder),
        "files": [path.name for path in files],
        "parameters": sum(dtypes.values()),
        "bytes": sum(row["bytes"] for row in table),
        "dtypes": dict(dtypes),
        "norm": math.hypot(*norms.values()),
        "fingerprint": _combined({k: m.fingerprint for k, m in measured.items()}),
        "largest": sorted(table, key=lambda row: -row["bytes"])[:_LARGEST],
        "copies": _copies(stored, measured),
        "layers": [
            {
                "layer": layer,
                "tensors": len(names),
                "parameters": sum(stored[name].size for name in names),
                "norm": math.hypot(*(norms[name] for name in names)),
            }
            for layer, names in _layers(norms).items()
        ],
        "tensors": table,
    }


def _opened(model: str) -> tuple[Path, Path, Mapping[str, Stored]]:
    """Returns the folder, the file that holds or lists the tensors, and the tensors."""
    if hub.is_vector(model):
        file = Path(model).expanduser()
        return file.parent, file, hub.open_vector(file).tensors
    folder = hub.find(model)
    if lora.is_adapter(folder):
        raise ValueError(
            f"{folder} is an adapter. To see what it adds, give the model that it "
            "belongs to with --base."
        )
    return folder, *hub.open_tensors(folder)


def _measured(array):
    dtype = str(jax.dtypes.canonicalize_dtype(array.dtype))
    found = (array.shape, dtype, fingerprint.of_array(array))
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return _Measured(None, 0, array.nbytes, found)
    flat, squares, bad = array.reshape(-1), 0.0, 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        if not np.isfinite(total := part @ part):
            finite = part[np.isfinite(part)]
            bad += part.size - finite.size
            total = finite @ finite
        squares += float(total)
    return _Measured(math.sqrt(squares), bad, array.nbytes, found)


def _combined(fingerprints: Mapping[str, tuple]) -> str:
    """Returns what `fingerprint.combined` returns for the whole tree."""
    return f"{zlib.crc32(json.dumps(fingerprints, sort_keys=True).encode()):08x}"


def _copies(
    stored: Mapping[str, Stored], measured: Mapping[str, _Measured]
) -> list[list[str]]:
    """Returns groups of matrices with the same bytes; equal vectors are rarely tied."""
    alike = collections.defaultdict(list)
    for name, found in measured.items():
        if len(stored[name].shape) > 1 and found.norm:
            alike[found.fingerprint].append(name)
    same = collections.defaultdict(list)
    for found, names in alike.items():
        if len(names) > 1:  # each is read once more, however many there are
            for name in names:
                digest = hashlib.sha256(stored[name].read().tobytes()).digest()
                same[found, digest].append(name)
    return [names for names in same.values() if len(names) > 1]


def _layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names by layer (`model.layers.0`); names outside layers by their module.

    Example:
      >>> _layers(["h.0.mlp.weight", "h.0.attn.bias", "wte.weight"])
      {'h.0': ['h.0.mlp.weight', 'h.0.attn.bias'], 'wte': ['wte.weight']}
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r"(.*?[./]\d+)[./]", name) or re.match(r"(.*)[./]", name)
        layers.setdefault(found[1] if found else name, []).append(name)
    return layers


def differences(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the differences of several checkpoints from the first, by tensor.

    Args:
      models: the results of `checkpoint`.
    """
    first, *rest = ({row["name"]: row for row in model["tensors"]} for model in models)
    found = []
    for model, rows in zip(models[1:], rest, strict=True):
        both = [name for name in first if name in rows]

        def other(key, names=both, rows=rows):
            return [
                [name, first[name][key], rows[name][key]]
                for name in names
                if first[name][key] != rows[name][key]
            ]

        keys = ("dtype", "shape", "fingerprint")
        found.append(
            {
                "model": model["model"],
                "missing": [name for name in first if name not in rows],
                "added": [name for name in rows if name not in first],
                "shapes": other("shape"),
                "dtypes": other("dtype"),
                "equal": sum(
                    all(first[name][key] == rows[name][key] for key in keys)
                    for name in both
                ),
            }
        )
    return found


def task_vectors(
    base: str,
    models: Sequence[str],
    *,
    vocabulary: policies.Vocabulary = "error",
    missing: policies.Missing = "error",
    dequantize: DTypeLike | None = None,
) -> dict[str, Any]:
    """Returns norms and cosines of task vectors, in total and by layer, as plain data.

    Args:
      base, models, vocabulary, missing, dequantize: as for `stream.open_models`.

    Raises:
      FileNotFoundError: a checkpoint does not exist.
      ValueError: a model does not fit the base, or has NaN or infinite values.
    """
    opened = stream.open_models(
        base,
        models,
        vocabulary=vocabulary,
        missing=missing,
        dequantize=dequantize,
    )
    params_0 = tree.floating(opened.params_0)
    for leaves, name in ((params_0, "base"), *zip(opened.taus, models, strict=True)):
        tree.check_finite(leaves, name)
    # The base is included for its norm: the differences read its tensors anyway.
    rows = tree.aligned([params_0, *opened.taus])
    with opened.progress.shown(stream.plan(opened).bytes_in, quiet=False):
        grams = {
            name: np.asarray(tree.gram_of([row]), np.float64)
            for name, row in rows.items()
        }
    grams = {name: grams[name] for name in sorted(grams, key=_in_order)}
    total = np.sum(list(grams.values()), axis=0)
    return {
        "base": base,
        "notes": list(opened.notes),
        "base_norm": math.sqrt(total[0, 0]),
        "models": [
            {"model": model, "name": name, "norm": norm, "relative": norm / scale}
            for model, name, norm in zip(
                models, _names(models), _norms(total), strict=True
            )
            for scale in [math.sqrt(total[0, 0]) or 1.0]
        ],
        "cosines": _cosines(total),
        "layers": [
            {"layer": layer, "norms": _norms(gram), "cosines": _cosines(gram)}
            for layer, names in _layers(grams).items()
            for gram in [np.sum([grams[name] for name in names], axis=0)]
        ],
        "tensors": [
            {
                "name": name,
                "shape": list(params_0[name].shape),
                "norms": _norms(gram),
            }
            for name, gram in grams.items()
        ],
    }


def _norms(gram) -> list[float]:
    return np.sqrt(np.diagonal(gram)[1:]).tolist()


def _cosines(gram) -> list[list[float]]:
    return np.asarray(tree.cosine(jnp.asarray(gram[1:, 1:], jnp.float32))).tolist()


def _names(models):
    """Returns the last parts of the paths, as many as needed to tell them apart."""
    parts = [Path(model).parts for model in models]
    for count in range(1, max(map(len, parts))):
        short = ["/".join(words[-count:]) for words in parts]
        if len(set(short)) == len(set(parts)):
            return short
    return list(models)


def _in_order(name):
    """Returns a key that sorts layer 2 before layer 10."""
    words = re.split(r"[./]", name)
    return [word.zfill(9) if word.isdigit() else word for word in words]
