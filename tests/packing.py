"""Packed weights made by hand: one bit after the other, in plain loops."""

import json

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
F8 = ml_dtypes.float8_e4m3fn
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
NF4 = np.linspace(-1, 1, 16).astype(np.float32)


def stream(fields, bits: int) -> np.ndarray:
    """Fields of one row as int32 words, the lowest bit first."""
    count = -(-len(fields) * bits // 32)
    words = [0] * count
    for i, field in enumerate(fields):
        for bit in range(bits):
            place = i * bits + bit
            words[place // 32] |= (int(field) >> bit & 1) << place % 32
    return np.array(words, np.uint32).view(np.int32)


def rows(fields: np.ndarray, bits: int) -> np.ndarray:
    return np.stack([stream(row, bits) for row in fields])


def halves(codes, low_first: bool) -> np.ndarray:
    """Codes of 4 bits, two in a byte."""
    found = []
    for a, b in zip(codes[::2], codes[1::2], strict=True):
        low, high = (a, b) if low_first else (b, a)
        found.append(int(low) + 16 * int(high))
    return np.array(found, np.uint8)


def gptq(q, zeros, scales, groups, bits: int, *, v2: bool = False) -> dict:
    """The tensors of `q` `[in, out]` with zeros and scales `[groups, out]`."""
    stored = zeros if v2 else (zeros - 1) % 2**bits
    return {
        "qweight": rows(q.T, bits).T.copy(),
        "qzeros": rows(stored, bits),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }


def awq_words(fields: np.ndarray) -> np.ndarray:
    words = np.zeros((len(fields), fields.shape[1] // 8), np.uint32)
    for i, row in enumerate(fields):
        for j, field in enumerate(row):
            place = [0, 2, 4, 6, 1, 3, 5, 7].index(j % 8)
            words[i, j // 8] |= np.uint32(int(field) << 4 * place)
    return words.view(np.int32)


def nf4(codes, scales, shape, *, blocksize=64, nested=None, dtype=np.uint8) -> dict:
    """The tensors of a weight in bitsandbytes' 4 bits, by what follows its name."""
    about = {"quant_type": "nf4", "blocksize": blocksize, "shape": list(shape)}
    found = {
        "": halves(codes, low_first=False).view(dtype).reshape(-1, 1),
        ".absmax": scales,
        ".quant_map": NF4,
    }
    if nested is not None:
        table, outer, size, offset = nested
        about |= {"nested_blocksize": size, "nested_offset": offset}
        found |= {".nested_quant_map": table, ".nested_absmax": outer}
    text = json.dumps(about | {"dtype": "bfloat16"}).encode()
    return found | {
        ".quant_state.bitsandbytes__nf4": np.frombuffer(text, np.uint8).copy()
    }


def mxfp4(codes: np.ndarray, exponents: np.ndarray) -> dict:
    """Blocks and scales of codes `[experts, out, in]`."""
    flat = codes.reshape(-1, 32)
    blocks = np.stack([halves(row, low_first=True) for row in flat])
    return {
        "_blocks": blocks.reshape(*exponents.shape, 16),
        "_scales": exponents.astype(np.uint8),
    }
