"""What is unpacked is what transformers unpacks."""

import numpy as np
import packing
import pytest

from jaxarith.hub.quantised import fp8, mxfp4

pytestmark = pytest.mark.torch


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_mxfp4_of_transformers(torch, rng):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = rng.integers(0, 16, (3, 10, 64))
    packed = packing.mxfp4(codes, rng.integers(90, 160, (3, 10, 2)))
    blocks, scales = packed["_blocks"], packed["_scales"]
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    np.testing.assert_array_equal(mxfp4.values(blocks, scales), theirs.float().numpy())


@pytest.mark.parametrize("exponents", [False, True])
def test_fp8_of_transformers_where_its_blocks_are_whole(exponents, torch, rng):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    numbers = torch.tensor(rng.normal(size=(256, 384)), dtype=torch.float32)
    packed = numbers.to(torch.float8_e4m3fn)
    scales = torch.tensor(rng.random((2, 3)), dtype=torch.float32)
    ours = scales.numpy()
    if exponents:
        scales = scales.to(torch.float8_e8m0fnu)
        ours = scales.view(torch.uint8).numpy()
    theirs = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.float32)
    given = packed.view(torch.uint8).numpy().view(packing.F8)
    np.testing.assert_array_equal(fp8.values(given, ours, (128, 128)), theirs.numpy())


def test_all_bytes_of_float8_are_those_of_torch(torch):
    every, ones = np.arange(256, dtype=np.uint8)[None], np.ones((1, 256), np.float32)
    theirs = torch.tensor(every)
    np.testing.assert_array_equal(
        fp8.values(every.view(packing.F8), ones, (1, 1)),
        theirs.view(torch.float8_e4m3fn).float().numpy(),
    )
    np.testing.assert_array_equal(
        fp8.values(ones.astype(packing.F8), every, (1, 1)),
        theirs.view(torch.float8_e8m0fnu).float().numpy(),
    )
