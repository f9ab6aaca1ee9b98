"""Stored quantizations: hand-worked values, round trips, and agreement with transformers' own decoders."""

from __future__ import annotations

import pytest
import torch

from moezip.errors import CheckpointError
from moezip.formats import fp8_block, mxfp4


def test_fp8_hand_worked_with_partial_blocks() -> None:
    # 3 x 5 in blocks of 2 x 4: row blocks {0,1}, {2}; column blocks {0..3}, {4}.
    codes = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15.0]]).to(torch.float8_e4m3fn)
    scale_inv = torch.tensor([[2.0, 10.0], [0.5, -1.0]])
    expected = torch.tensor([[2, 4, 6, 8, 50], [12, 14, 16, 18, 100], [5.5, 6, 6.5, 7, -15.0]])
    decoded = fp8_block.decode(codes, scale_inv, (2, 4), dtype=torch.float32)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0)


def test_fp8_rows_decode_as_in_the_whole() -> None:
    torch.manual_seed(0)
    codes, scale_inv = fp8_block.encode(torch.randn(2, 300, 200), (128, 128))
    assert scale_inv.shape == (2, 3, 2)
    whole = fp8_block.decode(codes, scale_inv)
    for start, stop in ((0, 300), (100, 200), (127, 129), (299, 300)):
        part = fp8_block.decode(codes[:, start:stop], scale_inv, first_row=start)
        assert torch.equal(part, whole[:, start:stop])


def test_fp8_round_trip_within_half_a_step() -> None:
    torch.manual_seed(1)
    weight = torch.randn(200, 260) * torch.logspace(-3, 3, 260)
    weight[:128, :128] = 0  # an all-zero block must not divide by zero
    codes, scale_inv = fp8_block.encode(weight)
    decoded = fp8_block.decode(codes, scale_inv, dtype=torch.float32)
    # e4m3 has 3 mantissa bits, so half a step is at most 2**-4 of the value; below 2**-6 * scale the steps are
    # 2**-9 * scale wide. The last factor leaves room for the float32 division.
    spread = scale_inv.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :260]
    allowed = torch.maximum(weight.abs() * 2**-4, spread * 2**-10) * (1 + 1e-5)
    assert ((decoded - weight).abs() <= allowed).all()
    again, _ = fp8_block.encode(decoded)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_fp8_agrees_with_transformers() -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    torch.manual_seed(2)
    codes, scale_inv = fp8_block.encode(torch.randn(256, 384))
    quantizer = type("Quantizer", (), {"quantization_config": type("Config", (), {"weight_block_size": [128, 128]})()})
    theirs = finegrained.Fp8Dequantize(quantizer())._dequantize_one(codes, scale_inv)
    ours = fp8_block.decode(codes, scale_inv, dtype=theirs.dtype)
    assert torch.equal(ours, theirs)


def test_fp8_refuses_factors_that_do_not_fit() -> None:
    codes = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    for shape in ((1, 2), (2, 1), (2, 3), (3, 2, 2)):
        with pytest.raises(CheckpointError, match="do not fit"):
            fp8_block.decode(codes, torch.ones(shape), (2, 2))


def test_fp8_block_size() -> None:
    assert fp8_block.block_size({}) == (128, 128)
    assert fp8_block.block_size({"quantization_config": {"weight_block_size": [64, 32]}}) == (64, 32)
    with pytest.raises(CheckpointError, match="weight_block_size"):
        fp8_block.block_size({"quantization_config": {"weight_block_size": [0, 32]}})


def test_mxfp4_hand_worked() -> None:
    # Byte 0x10: low half 0 -> 0.0 first, high half 1 -> 0.5. Byte 0x72: 2 -> 1.0, 7 -> 6.0. Byte 0xF9: 9 -> -0.5,
    # 15 -> -6.0. Scale 128 is 2 ** (128 - 127) = 2, scale 126 is 1/2.
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, :3] = torch.tensor([0x10, 0x72, 0xF9], dtype=torch.uint8)
    blocks[0, 1, 15] = 0x35  # 5 -> 3.0, 3 -> 1.5
    scales = torch.tensor([[128, 126]], dtype=torch.uint8)
    decoded = mxfp4.decode(blocks, scales)
    assert decoded.dtype == torch.bfloat16 and decoded.shape == (1, 64)
    expected = torch.zeros(64)
    expected[:6] = torch.tensor([0, 1, 2, 12, -1, -12.0])
    expected[62:] = torch.tensor([1.5, 0.75])
    assert torch.equal(decoded[0].float(), expected)


def test_mxfp4_scale_255_is_nan() -> None:
    blocks = torch.full((1, 1, 16), 0x11, dtype=torch.uint8)
    assert mxfp4.decode(blocks, torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


def test_mxfp4_agrees_with_transformers() -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    torch.manual_seed(3)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    # Every exponent at which both the smallest (0.5) and the largest code (6) stay normal bfloat16 numbers.
    scales = torch.randint(3, 251, (2, 6, 3), dtype=torch.uint8)
    expected = theirs(blocks, scales)  # [experts, columns, rows]: the in-memory form of gpt-oss is transposed
    assert torch.equal(mxfp4.decode(blocks, scales).transpose(1, 2), expected)


def test_mxfp4_round_trip() -> None:
    torch.manual_seed(4)
    weight = torch.randn(3, 8, 96) * torch.logspace(-4, 4, 3)[:, None, None]
    blocks, scales = mxfp4.encode(weight)
    decoded = mxfp4.decode(blocks, scales, dtype=torch.float32)
    # Half of the widest step (4 to 6) is one unit of the scale.
    unit = torch.pow(2.0, scales.float() - 127).repeat_interleave(32, -1)
    assert ((decoded - weight).abs() <= unit).all()
    again = mxfp4.decode(*mxfp4.encode(decoded), dtype=torch.float32)
    assert torch.equal(again, decoded)
    # A part along the leading axes is decoded as in the whole.
    assert torch.equal(mxfp4.decode(blocks[1, 2:5], scales[1, 2:5], dtype=torch.float32), decoded[1, 2:5])


def test_mxfp4_ties_go_to_the_even_code() -> None:
    # 6.0 fixes the scale at 1. Middles: 0.25 -> 0 (code 0), 0.75 -> 1.0 (code 2), 1.25 -> 1.0, 1.75 -> 2.0 (code 4),
    # 2.5 -> 2.0, 3.5 -> 4.0 (code 6), 5.0 -> 4.0.
    weight = torch.zeros(1, 32)
    weight[0, :8] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -5.0])
    decoded = mxfp4.decode(*mxfp4.encode(weight), dtype=torch.float32)
    assert decoded[0, :8].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, -4.0]


def test_mxfp4_refuses_what_does_not_belong_together() -> None:
    blocks = torch.zeros(2, 3, 16, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="belong together"):
        mxfp4.decode(blocks, torch.zeros(2, 4, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="belong together"):
        mxfp4.decode(blocks[..., :8], torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="does not divide"):
        mxfp4.encode(torch.zeros(2, 33))
