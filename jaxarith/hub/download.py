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
    """The folder of a checkpoint: a local one, or one downloaded from the Hub.

    Configuration, tokenizer and weights are downloaded, the weights in one format:
    safetensors where the repository has them, else msgpack, else PyTorch's where that
    is installed, else OpenCLIP's. Where the Hub cannot be reached, a copy that was
    downloaded before is used.

    Args:
      model: a folder; the folder of a model in the Hub's cache, such as `models--a--b`;
        or the id of a model such as `openai/clip-vit-base-patch32`, perhaps with
        `@revision`.
      revision: a branch, tag or commit on the Hub, such as `refs/pr/32`.

    Raises:
      FileNotFoundError: there is neither a folder nor a model that can be downloaded.
      ValueError: the model's weights are in no format that jaxarith reads, or `model`
        is a file.

    Example:
      >>> find("google-t5/t5-small")  # doctest: +SKIP
      PosixPath('…/models--google-t5--t5-small/snapshots/…')
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _snapshot(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected the folder of a checkpoint.")
    import huggingface_hub  # here: local folders do not need it
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    model = str(model)
    if revision is None and "@" in model:
        model, _, revision = model.partition("@")
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        info = huggingface_hub.model_info(model, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"the Hub has no {model!r}{at} for you: {str(error).strip()}\n"
            "Check the spelling; where access is restricted, run `hf auth login`."
        ) from error
    # Any failure to reach the Hub, for which its client has many exceptions.
    except Exception as unreachable:
        try:
            cached = huggingface_hub.snapshot_download(
                model, revision=revision, local_files_only=True
            )
        except Exception:
            raise FileNotFoundError(
                f"{model!r}{at} is not a folder, is not in the download cache, "
                f"and the Hub did not give it: {str(unreachable).strip()}\n"
                "Check the spelling and the connection, or give the path of a folder "
                f"that holds {CONFIG} and {WEIGHTS}."
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
    # What else belongs to the model: other tokenizers, licences, layers of
    # sentence-transformers in folders of their own, such as 2_Dense.
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
    """The folder itself, or the current snapshot where it is a model of the cache."""
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if (folder / CONFIG).exists() or not snapshots.is_dir():
        return folder
    if main.is_file():
        return snapshots / main.read_text(encoding="utf-8").strip()
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{folder} is a model in the Hub's cache without a main branch; name one "
            f"of its snapshots: {names}."
        )
    return found[0]
