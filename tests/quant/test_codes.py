"""Packing is lossless, and no activation is off by more than half a step of its token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import bit_widths, seeds, weights

from thermo_lib.quant.codes import fake_quantize, fake_quantize_per_token, pack, quantize_codes, unpack
from thermo_lib.quant.gptq import gptq
from thermo_lib.quant.rounding import least_squares, round_to_nearest


class TestPacking:
    """Codes come back as they were, whatever their number, and take no more bytes than they need."""

    @pytest.mark.parametrize(
        ("bits", "group_size", "codes", "packed"),
        [  # the first code in the lowest bits
            (2, 1, [0, 1, 2, 3], [0b11_10_01_00]),
            (2, 1, [3, 0, 0, 0, 1], [0b00_00_00_11, 0b00_00_00_01]),
            (2, 8, [0, 1, 2, 3, 3, 2, 1, 0] * 2, [0b01_11_10_00, 0b00_10_11_01] * 2),  # 0 2 3 1, then 1 3 2 0
            (2, 8, [0, 1, 2, 3, 3, 2, 1, 0] + [1] * 4, [0b11_10_01_00, 0b00_01_10_11, 0b01_01_01_01]),  # a narrow group
            (2, 6, [0, 1, 2, 3, 3, 2] * 2, [0b11_10_01_00, 0b01_00_10_11, 0b10_11_11_10]),  # not whole bytes
            (4, 1, [1, 15, 7], [0b1111_0001, 0b0000_0111]),
            (4, 4, [1, 15, 7, 2], [0b0111_0001, 0b0010_1111]),
            (8, 3, [0, 200, 255], [0, 200, 255]),
        ],
    )
    def test_golden_bytes(self, bits: int, group_size: int, codes: list[int], packed: list[int]) -> None:
        assert pack(torch.tensor(codes, dtype=torch.uint8), bits, group_size).tolist() == packed

    @given(bits=bit_widths, rows=st.integers(1, 4), count=st.integers(1, 33), group_size=st.integers(1, 33), seed=seeds)
    def test_unpacking_packed_codes_gives_the_codes(
        self, bits: int, rows: int, count: int, group_size: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=generator)
        packed = pack(codes, bits, group_size)
        assert packed.shape == (rows, -(-count * bits // 8))
        assert packed.dtype == torch.uint8
        assert torch.equal(unpack(packed, bits, count, group_size), codes)

    @pytest.mark.parametrize("bits", [0, 1, 3, 5, 16])
    def test_other_bit_widths_are_refused(self, bits: int) -> None:
        codes = torch.zeros(4, dtype=torch.uint8)
        weight = torch.ones(1, 4)
        for call in (
            lambda: pack(codes, bits),
            lambda: unpack(codes, bits, 4),
            lambda: round_to_nearest(weight, bits, 4),
            lambda: least_squares(weight, bits, 4),
            lambda: gptq(weight, torch.eye(4), bits, 4, 0.01, 0.0),
        ):
            with pytest.raises(ValueError, match=f"bits: found {bits}, allowed are 2, 4, 8"):
                call()


class TestActivations:
    """Fake quantization of activations, with given parameters and with each token's own range."""

    @given(
        bits=st.integers(2, 8),
        features=st.integers(1, 20),
        seed=seeds,
        size=st.floats(1e-3, 1e3),
        mean=st.floats(-2, 2),
    )
    def test_no_activation_is_off_by_more_than_half_a_step_of_its_token(
        self, bits: int, features: int, seed: int, size: float, mean: float
    ) -> None:
        x = weights(5, features, seed, size, mean * size)
        span = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
        error = (fake_quantize_per_token(x, bits) - x).abs()
        assert (error <= span / (2**bits - 1) / 2 * (1 + 1e-4) + 1e-6).all()

    @given(bits=st.integers(2, 8), seed=seeds)
    def test_a_token_does_not_depend_on_the_others(self, bits: int, seed: int) -> None:
        x = weights(6, 8, seed)
        assert torch.equal(fake_quantize_per_token(x, bits)[2:3], fake_quantize_per_token(x[2:3], bits))

    @given(bits=st.integers(2, 8), seed=seeds, low=st.floats(-2, 0.5), high=st.floats(0.6, 2))
    def test_zero_stays_exactly_zero_and_few_values_are_left(
        self, bits: int, seed: int, low: float, high: float
    ) -> None:
        x = torch.rand(3, 50, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
        x[:, ::5] = 0
        quantized = fake_quantize_per_token(x, bits)
        assert (quantized[:, ::5] == 0).all()
        assert all(len(row.unique()) <= 2**bits for row in quantized)

    @given(bits=st.integers(3, 8), seed=seeds, clip=st.floats(0.5, 0.95))
    def test_a_clipped_range_is_finer_inside_and_holds_what_is_outside(self, bits: int, seed: int, clip: float) -> None:
        x = weights(5, 40, seed)
        low, high = (clip * end for end in (x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)))
        step = (high - low) / (2**bits - 1)
        quantized = fake_quantize_per_token(x, bits, clip)
        inside = (x > low + step) & (x < high - step)
        assert ((quantized - x).abs() <= step / 2 * (1 + 1e-4) + 1e-6)[inside].all()
        assert (quantized >= low - step).all()
        assert (quantized <= high + step).all()
        assert torch.equal(fake_quantize_per_token(x, bits, 1.0), fake_quantize_per_token(x, bits))

    def test_a_token_of_zeros_stays_zero(self) -> None:
        assert torch.equal(fake_quantize_per_token(torch.zeros(2, 4), 2), torch.zeros(2, 4))

    def test_given_parameters_clip_what_lies_outside(self) -> None:
        # scale 0.5, zero point 1, two bits: codes 0..3 stand for -0.5, 0, 0.5, 1.
        x = torch.tensor([-9.0, -0.5, -0.2, 0.0, 0.3, 0.6, 1.0, 9.0])
        expected = [-0.5, -0.5, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
        scale, zero = torch.tensor(0.5), torch.tensor(1.0)
        assert fake_quantize(x, scale, zero, 2).tolist() == expected
        assert quantize_codes(x, scale, zero, 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
