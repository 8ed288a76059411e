"""A tensor of a checkpoint that is not read yet."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

# Dtypes by their names in safetensors files.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
    # Dtypes of quantised models and complex numbers are recognised, but not read.
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F6_E3M2": np.dtype(ml_dtypes.float6_e3m2fn),
    "F6_E2M3": np.dtype(ml_dtypes.float6_e2m3fn),
    "F4": np.dtype(ml_dtypes.float4_e2m1fn),
    "C64": np.dtype(np.complex64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FLOATS = [DTYPES[name] for name in ("F64", "F32", "F16", "BF16")]
NUMERIC = [*_FLOATS, *(dtype for dtype in NAMES if dtype.kind in "iub")]


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of a checkpoint that is not read yet: in a file, or made when read.

    Attributes:
      dtype: dtype of its values.
      shape: its shape.
      load: `load(count)` reads the first `count` entries, row by row, as a vector.

    Example:
      >>> eye = Stored.made(np.float32, (2, 2), lambda: np.eye(2, dtype=np.float32))
      >>> print(eye, eye.rows(1).read())
      f32[2, 2] [[1. 0.]]
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    load: Callable[[int], np.ndarray]

    @classmethod
    def made(
        cls, dtype: DTypeLike, shape: Sequence[int], make: Callable[[], np.ndarray]
    ) -> "Stored":
        """Returns a tensor that `make()` computes as a whole when it is read.

        Args:
          dtype: dtype of the array that `make` returns.
          shape: its shape.
          make: computes the array.
        """

        def load(count):
            return make().reshape(-1)[:count]

        return cls(np.dtype(dtype), tuple(shape), load)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def is_floating(self) -> bool:
        """Whether its dtype is float16, bfloat16, float32 or float64."""
        return self.dtype in _FLOATS

    def rows(self, count: int) -> "Stored":
        """Returns the tensor of the first `count` rows; only these are read."""
        return dataclasses.replace(self, shape=(count, *self.shape[1:]))

    def read(self) -> np.ndarray:
        """Reads the values.

        Raises:
          ValueError: its file was changed or cut short since it was opened.
        """
        return self.load(self.size).reshape(self.shape)

    def __str__(self) -> str:
        return described(self.dtype, self.shape)


def short(dtype: DTypeLike) -> str:
    """Returns the short name of a dtype, as XLA and safetensors write it.

    Example:
      >>> short("float32"), short("bfloat16")
      ('f32', 'bf16')
    """
    dtype = np.dtype(dtype)
    return NAMES.get(dtype, dtype.name).lower()


def described(dtype: DTypeLike, shape: Sequence[int]) -> str:
    """Returns a dtype and a shape as messages show them, as in `f32[3, 4]`."""
    return f"{short(dtype)}{list(shape)}"
