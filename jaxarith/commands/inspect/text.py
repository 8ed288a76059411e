"""Writes the results of `jaxarith inspect` as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxarith import tree
from jaxarith.report import markdown_table


def of_models(found: Mapping[str, Any], tensors: bool) -> str:
    """Returns the report of single checkpoints and of their differences."""
    models = found["models"]
    parts = []
    for model in models:
        parts += [f"# {model['model']}", _facts(model)]
        if len(models) == 1:
            parts += ["## Largest tensors", _tensors(model["largest"])]
            parts += ["## Layers", _layers(model["layers"])]
        if tensors:
            parts += ["## Tensors", _tensors(model["tensors"])]
    for entry in found["differences"]:
        parts += [
            f"# {entry['model']} beside {models[0]['model']}",
            _differences(entry),
        ]
    return "\n\n".join(parts)


def of_task_vectors(found: Mapping[str, Any], tensors: bool) -> str:
    """Returns the report of task vectors."""
    names = [model["name"] for model in found["models"]]
    rows = [
        [
            model["name"],
            model["model"],
            _short(model["norm"]),
            _short(model["relative"]),
        ]
        for model in found["models"]
    ]
    header = ["task vector", "model", "norm", "norm / base's"]
    parts = [
        f"# Task vectors on {found['base']}",
        "\n".join(f"- note: {note}" for note in found["notes"]),
        f"The base's norm is {_short(found['base_norm'])}.",
        _table(header, rows, 2),
    ]
    several = len(names) > 1
    if several:
        cosines = [
            [name, *(f"{value:.4f}" for value in row)]
            for name, row in zip(names, found["cosines"], strict=True)
        ]
        parts += ["## Cosines", _table(["", *names], cosines, 1)]
    rows = [
        [entry["layer"], *map(_short, entry["norms"]), *_mean(entry)]
        for entry in found["layers"]
    ]
    header = ["layer", *(f"norm of {name}" for name in names)]
    parts += ["## Layers", _table(header + ["mean cosine"] * several, rows, 1)]
    if tensors:
        rows = [
            [entry["name"], str(entry["shape"]), *map(_short, entry["norms"])]
            for entry in found["tensors"]
        ]
        header = ["tensor", "shape", *(f"norm of {name}" for name in names)]
        parts += ["## Tensors", _table(header, rows, 2)]
    return "\n\n".join(part for part in parts if part)


def _mean(entry):
    """Returns the mean cosine of nonzero pairs, if there are several vectors."""
    rows, columns = np.triu_indices(len(entry["norms"]), 1)
    moved = np.array(entry["norms"]) > 0
    pairs = np.asarray(entry["cosines"])[rows, columns][moved[rows] & moved[columns]]
    return [f"{pairs.mean():.4f}" if pairs.size else ""] * (rows.size > 0)


def _facts(model):
    counts = ", ".join(f"{count:,} {dtype}" for dtype, count in model["dtypes"].items())
    files = tree.counted(len(model["files"]), "file")
    lines = [
        f"- {tree.counted(len(model['tensors']), 'tensor')}, "
        f"{model['parameters']:,} parameters ({counts})",
        f"- {model['bytes']:,} bytes in {files}, {_some(model['files'])}",
        f"- norm {_short(model['norm'])}",
        f"- fingerprint {model['fingerprint']}",
    ]
    lines += [
        f"- {' and '.join(names) if len(names) == 2 else _some(names)} have the same "
        "bytes"
        for names in model["copies"]
    ]
    bad = [row for row in model["tensors"] if row["not_finite"]]
    texts = [f"{row['name']} ({row['not_finite']:,})" for row in bad]
    lines.append(f"- NaN or infinite values: {_some(texts) or 'none'}")
    return "\n".join(lines)


def _tensors(rows):
    cells = [
        [row["name"], row["dtype"], str(row["shape"]), _short(row["norm"])]
        for row in rows
    ]
    return _table(["tensor", "dtype", "shape", "norm"], cells, 3)


def _layers(layers):
    rows = [
        [
            entry["layer"],
            str(entry["tensors"]),
            f"{entry['parameters']:,}",
            _short(entry["norm"]),
            _short(entry["norm"] / max(entry["parameters"], 1) ** 0.5),
        ]
        for entry in layers
    ]
    header = ["layer", "tensors", "parameters", "norm", "root mean square"]
    return _table(header, rows, 1)


def _differences(entry):
    def changed(key):
        return [f"{name} ({a} → {b})" for name, a, b in entry[key]]

    lines = [f"- {tree.counted(entry['equal'], 'tensor is', 'tensors are')} equal"]
    for title, items in {
        "missing": entry["missing"],
        "added": entry["added"],
        "of another shape": changed("shapes"),
        "of another dtype": changed("dtypes"),
    }.items():
        if items:
            are = tree.counted(len(items), "tensor is", "tensors are")
            lines.append(f"- {are} {title}: {_some(items)}")
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], texts: int) -> str:
    """Returns a table of strings; the first `texts` columns are aligned to the left."""
    right = [i >= texts for i in range(len(header))]
    return markdown_table(header, rows, right=right)


def _short(number):
    return "" if number is None else f"{number:.4g}"


def _some(items):
    return ", ".join(tree.first_few(items))
