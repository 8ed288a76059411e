"""Reads tensors of PyTorch's own files, which are pickles, as data only.

A pickle may run any code. `torch.load(weights_only=True)` builds only tensors and plain
containers of them, and refuses everything else.
"""

import importlib.util
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxarith.hub.stored import Stored

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def readable() -> bool:
    """Whether PyTorch, which reads these files, is installed."""
    return importlib.util.find_spec("torch") is not None


def open_file(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a state dict by name.

    Files of PyTorch 1.6 or newer are memory-mapped, so a tensor takes memory only when
    it is read. Older files are loaded whole. If the file holds a dict with an entry
    "state_dict", as OpenCLIP's training writes it, that entry is used.

    Raises:
      FileNotFoundError: the file does not exist.
      ImportError: PyTorch is not installed.
      ValueError: the file is not a state dict, or PyTorch refuses to read it as data.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; expected weights of PyTorch. Check the path."
        )
    try:
        import torch  # here: nothing else needs it
    except ImportError as error:
        raise ImportError(
            f"{path} is a file of PyTorch, which is not installed: pip install torch."
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error below reports TorchScript
        content = _loaded(torch, path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    strange = not isinstance(content, Mapping) or any(
        not isinstance(leaf, torch.Tensor) for leaf in content.values()
    )
    if strange or not content:
        raise ValueError(
            f"{path} does not hold a state dict; expected a dict of tensors. Save "
            "model.state_dict() instead."
        )
    return {str(name): _stored(torch, leaf) for name, leaf in content.items()}


def _loaded(torch: Any, path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (EOFError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(_cut(path)) from error
    except (RuntimeError, pickle.UnpicklingError, ValueError) as error:
        if "PytorchStreamReader" in str(error):  # the archive itself is broken
            raise ValueError(_cut(path)) from error
        if "TorchScript" in str(error):
            how = "It is a TorchScript archive, as OpenAI's are: torch.jit.load(FILE)"
        else:
            how = (
                "A file of whole objects, such as the image encoders that papers "
                "publish, runs code when it is opened. If you trust it, load it once "
                "where its classes are installed: torch.load(FILE, weights_only=False)"
            )
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        [reason, *_] = str(error).splitlines() or [repr(error)]
        reason = f"it holds an object of {found[1]}." if found else reason
        raise ValueError(
            f"PyTorch does not read {path} as tensors alone: {reason}\n{how}; then "
            "torch.save(_.state_dict(), NEW)."
        ) from error


def _cut(path):
    size = path.stat().st_size
    return f"{path} ({size} bytes) is truncated or corrupt. Download or write it again."


def _stored(torch: Any, leaf: Any) -> Stored:
    """Returns the tensor as a NumPy array; bfloat16 is passed on as its bits."""
    if leaf.dtype == torch.bfloat16:
        array = leaf.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = leaf.detach().numpy()
    return Stored.made(array.dtype, array.shape, lambda: np.asarray(array))
