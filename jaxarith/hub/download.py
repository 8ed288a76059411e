"""Finds the folder of a checkpoint, on this machine or on the Hugging Face Hub."""

import os
import re
from pathlib import Path

from jaxarith.hub import open_clip, pickles
from jaxarith.hub.folders import (
    ADAPTER,
    CONFIG,
    INDEX,
    MSGPACK,
    PICKLE,
    PICKLE_INDEX,
    SIDE_SUFFIXES,
    WEIGHTS,
    is_side_file,
    no_weights,
)


def find(model: str | os.PathLike, *, revision: str | None = None) -> Path:
    """Finds the folder of a checkpoint, or downloads it from the Hugging Face Hub.

    A download contains the configuration, the tokenizer and the weights in one format:
    safetensors if the repository has them, else msgpack, else PyTorch's if PyTorch is
    installed, else OpenCLIP's. If the Hub cannot be reached, a copy from an earlier
    download is used.

    Args:
      model: a folder; or the folder of a model in the Hub's cache (`models--a--b`); or
        the id of a model (`openai/clip-vit-base-patch32`), with or without `@revision`.
      revision: a branch, tag or commit on the Hub, for example `refs/pr/32`.

    Returns:
      The path of the folder.

    Raises:
      FileNotFoundError: no such folder exists, and no such model can be downloaded.
      ValueError: jaxarith cannot read the format of the model's weights, or `model` is
        a file.

    Example:
      >>> find("google-t5/t5-small")  # doctest: +SKIP
      PosixPath('…/models--google-t5--t5-small/snapshots/…')
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _snapshot(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected the folder of a checkpoint.")
    model = str(model)
    if revision is None and "@" in model:
        model, _, revision = model.partition("@")
    check_id(model)
    import huggingface_hub  # here: local folders do not need it
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    at = "" if revision is None else f" at revision {revision!r}"
    try:
        info = huggingface_hub.model_info(model, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"the Hub shows you no model {model!r}{at}: {str(error).strip()}\n"
            "Check the spelling. If access is restricted, run `hf auth login`."
        ) from error
    # The client raises many exceptions when it cannot reach the Hub.
    except Exception as unreachable:
        try:
            cached = huggingface_hub.snapshot_download(
                model, revision=revision, local_files_only=True
            )
        except Exception:
            raise FileNotFoundError(
                f"{model!r}{at} is not a folder and not in the download cache, and it "
                f"could not be downloaded: {str(unreachable).strip()}\n"
                "Check the spelling and the connection, or name a folder that holds "
                f"{CONFIG} and {WEIGHTS}."
            ) from unreachable
        return Path(cached)
    names = [file.rfilename for file in info.siblings or []]
    if any(name in (WEIGHTS, INDEX) for name in names):
        weights = "model*.safetensors"
    elif MSGPACK in names:
        weights = MSGPACK
    elif ADAPTER in names:
        weights = ADAPTER
    elif pickles.readable() and any(x in (PICKLE, PICKLE_INDEX) for x in names):
        weights = "pytorch_model*.bin"
    elif found := [name for name in open_clip.WEIGHTS if name in names]:
        weights = found[0]
    else:
        raise ValueError(no_weights(f"{model}{at}", names))
    patterns = [*(f"*{suffix}" for suffix in SIDE_SUFFIXES), weights]
    # These also belong to the model: other tokenizers, licences, and the layers of
    # sentence-transformers, which have their own folders (2_Dense).
    patterns += [
        name
        for name in names
        if (is_side_file(name) and "/" not in name and not name.endswith(SIDE_SUFFIXES))
        or ("modules.json" in names and re.match(r"\d+_\w+/", name))
    ]
    return Path(
        huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=patterns
        )
    )


def _snapshot(folder: Path) -> Path:
    """Returns the folder, or its current snapshot if it is a model of the cache."""
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if (folder / CONFIG).exists() or not snapshots.is_dir():
        return folder
    if main.is_file():
        return snapshots / main.read_text(encoding="utf-8").strip()
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{folder} is a model in the Hub's cache without a main branch. Name one "
            f"of its snapshots: {names}."
        )
    return found[0]


def check_id(model: str) -> None:
    """Checks that a name without a folder can be the id of a model on the Hub.

    Raises:
      FileNotFoundError: it can only be a path.
    """
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(
            f"{model!r} is not a folder, and cannot be the id of a model on the Hub. "
            f"Check the spelling, or name a folder that holds {CONFIG} and {WEIGHTS}."
        )
