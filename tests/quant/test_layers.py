"""A quantized layer computes what a layer with the dequantized weight computes, at every timestep."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matrices import bit_widths, seeds, weights
from torch import Tensor, nn

from thermo_lib.quant.calls import denoising
from thermo_lib.quant.codes import QuantizedWeight, fake_quantize, fake_quantize_per_token, pack
from thermo_lib.quant.input_ranges import DynamicRanges, StaticRanges
from thermo_lib.quant.layers import QuantizedEmbedding, QuantizedLinear, TrellisLinear, keeping_weights
from thermo_lib.quant.rounding import round_to_nearest

FIRST_ROW = torch.zeros(1, dtype=torch.int32)


def linear_of(quantized: QuantizedWeight, bias: Tensor | None = None, **more: Any) -> QuantizedLinear:
    """A layer that computes from a quantized weight."""
    layer = QuantizedLinear(
        quantized.codes.shape[1],
        quantized.codes.shape[0],
        bits=quantized.bits,
        group_size=quantized.group_size,
        bias=bias is not None,
        **more,
    )
    layer.packed = pack(quantized.codes, quantized.bits, quantized.group_size)
    layer.scale[0], layer.zero_point[0] = quantized.scale, quantized.zero_point
    if bias is not None:
        layer.bias = bias
    return layer


class TestQuantizedLinear:
    """The layer computes what a linear layer with the dequantized weight computes, from packed codes."""

    @given(
        bits=bit_widths,
        columns=st.integers(1, 21),
        group_size=st.integers(1, 24),
        has_bias=st.booleans(),
        seed=seeds,
    )
    def test_forward_is_that_of_the_dequantized_weight(
        self, bits: int, columns: int, group_size: int, has_bias: bool, seed: int
    ) -> None:
        quantized = round_to_nearest(weights(5, columns, seed), bits, group_size)
        bias = weights(1, 5, seed + 1)[0] if has_bias else None
        x = weights(6, columns, seed + 2).view(2, 3, columns)
        layer = linear_of(quantized, bias)
        assert torch.equal(layer.weight(), quantized.dequantize())
        assert torch.equal(layer(x), F.linear(x, quantized.dequantize(), bias))

    @pytest.mark.parametrize(("bits", "width"), [(2, 8), (4, 15), (8, 30)])
    def test_codes_are_stored_packed(self, bits: int, width: int) -> None:
        # 30 codes a row: four, two or one of them a byte, rounded up.
        layer = linear_of(round_to_nearest(weights(5, 30, 0), bits, 30))
        stored = {name: tensor.numel() * tensor.element_size() for name, tensor in layer.state_dict().items()}
        assert stored["packed"] == 5 * width
        assert (stored["scale"], stored["zero_point"]) == (5 * 2, 5 * 2)
        assert sum(stored.values()) < 5 * width + 30

    def test_parameters_follow_the_timestep(self) -> None:
        quantized = round_to_nearest(weights(2, 4, 0), 4, 4)
        layer = linear_of(quantized, timesteps=4)
        layer.scale = torch.stack([quantized.scale, quantized.scale * 2])
        layer.zero_point = torch.stack([quantized.zero_point] * 2)
        layer.row_of_step = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
        found = []
        for timestep in range(4):
            with denoising((timestep, 4)):
                found.append(layer.weight())
        weight = quantized.dequantize()
        assert [torch.equal(a, b) for a, b in zip(found, [weight, weight, 2 * weight, 2 * weight], strict=True)] == [
            True
        ] * 4

    @given(timesteps=st.integers(1, 40), total=st.integers(1, 100), share=st.floats(0, 1, exclude_max=True))
    def test_another_number_of_steps_takes_the_step_at_the_same_mask_ratio(
        self, timesteps: int, total: int, share: float
    ) -> None:
        layer = QuantizedLinear(1, 1, bits=2, group_size=1, bias=False, timesteps=timesteps)
        layer.row_of_step = torch.arange(timesteps, dtype=torch.int32)
        timestep = int(share * total)
        with denoising((timestep, total)):
            found = layer.row()
        # The table's step that holds the same time: t / timesteps <= timestep / total < (t + 1) / timesteps.
        assert found * total <= timestep * timesteps < (found + 1) * total

    def test_without_a_call_it_is_the_first_timestep(self) -> None:
        layer = QuantizedLinear(1, 1, bits=2, group_size=1, bias=False, timesteps=4)
        layer.row_of_step = torch.arange(4, dtype=torch.int32)
        assert layer.row() == 0
        with denoising((3, 4)):
            assert layer.row() == 3
        assert layer.row() == 0

    def test_static_activation_parameters_follow_the_timestep(self) -> None:
        quantized = round_to_nearest(weights(3, 4, 0), 8, 4)
        scale, zero_point = torch.tensor([0.1, 0.5]).view(2, 1, 1), torch.tensor([8.0, 7.0]).view(2, 1, 1)
        ranges = StaticRanges(4, scale, zero_point, torch.tensor([0, 1], dtype=torch.int32))
        layer = linear_of(quantized, input_quantizer=ranges, timesteps=2)
        x = weights(5, 4, 1)
        for timestep, (scale, zero) in enumerate(((0.1, 8.0), (0.5, 7.0))):
            rounded = fake_quantize(x, torch.tensor(scale), torch.tensor(zero), 4)
            with denoising((timestep, 2)):
                assert torch.equal(layer(x), F.linear(rounded, quantized.dequantize()))

    def test_static_activation_parameters_follow_token_state_and_channel_group(self) -> None:
        quantized = round_to_nearest(weights(3, 5, 0), 8, 5)
        scale = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]])
        zero_point = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
        layer = linear_of(quantized, input_quantizer=StaticRanges(4, scale, zero_point, FIRST_ROW, group_size=2))
        is_masked = torch.tensor([[True, False], [False, False]])
        x = weights(4, 5, 1).view(2, 2, 5)
        with denoising((0, 1), is_masked):
            found = layer(x)
        with pytest.raises(ValueError, match="token states: found none, expected a call that says which"):
            layer(x)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            state = int(is_masked[row, column])
            scale = torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.3], [0.4, 0.4, 0.5, 0.5, 0.6]])[state]
            zero = torch.tensor([[1.0, 1, 2, 2, 3], [4, 4, 5, 5, 6]])[state]
            rounded = fake_quantize(x[row, column], scale, zero, 4)
            torch.testing.assert_close(found[row, column], F.linear(rounded, quantized.dequantize()))

    def test_dynamic_activations_have_each_token_s_own_range(self) -> None:
        quantized = round_to_nearest(weights(3, 4, 0), 8, 4)
        layer = linear_of(quantized, input_quantizer=DynamicRanges(4))
        x = weights(5, 4, 1)
        assert torch.equal(layer(x), F.linear(fake_quantize_per_token(x, 4), quantized.dequantize()))

    @pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
    def test_casting_leaves_the_parameters_of_codes_as_they_are(self, cast: Callable[[nn.Module], nn.Module]) -> None:
        ranges = StaticRanges(4, torch.tensor([[[0.1]]]), torch.tensor([[[8.0]]]), FIRST_ROW)
        layer = linear_of(round_to_nearest(weights(3, 8, 0), 4, 4), weights(1, 3, 1)[0], input_quantizer=ranges)
        before = layer.state_dict()
        after = cast(layer).state_dict()
        assert after.pop("bias").dtype == cast(nn.Linear(1, 1)).bias.dtype
        for name, tensor in after.items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_static_ranges_keep_the_type_of_the_input(self, dtype: torch.dtype) -> None:
        ranges = StaticRanges(4, torch.tensor([[[0.1]]]), torch.tensor([[[8.0]]]), FIRST_ROW)
        coded = round_to_nearest(weights(3, 8, 0), 4, 4)
        layer = linear_of(coded, weights(1, 3, 1)[0], input_quantizer=ranges).to(dtype)
        x = weights(5, 8, 2).to(dtype)
        assert layer(x).dtype == dtype
        assert torch.equal(layer.quantized_input(x), fake_quantize(x.float(), 0.1, 8.0, 4).to(dtype))

    def test_rows_that_are_loaded_are_the_rows_that_count(self) -> None:
        quantized = round_to_nearest(weights(2, 4, 0), 4, 4)
        layers = [linear_of(quantized, timesteps=2) for _ in range(2)]
        for layer, rows in zip(layers, ([0, 1], [1, 0]), strict=True):
            layer.scale = torch.stack([quantized.scale, quantized.scale * 2])
            layer.zero_point = torch.stack([quantized.zero_point] * 2)
            layer.row_of_step = torch.tensor(rows, dtype=torch.int32)
        assert torch.equal(layers[0].weight(), quantized.dequantize())
        layers[0].load_state_dict(layers[1].state_dict())
        assert torch.equal(layers[0].weight(), 2 * quantized.dequantize())

    def test_a_group_beyond_the_row_is_the_row(self) -> None:
        quantized = round_to_nearest(weights(3, 7, 0), 8, 7)
        wide = replace(quantized, group_size=10**15)
        assert torch.equal(linear_of(wide).weight(), quantized.dequantize())
        table = QuantizedEmbedding(3, 7, bits=8, group_size=10**15, dtype=torch.float32)
        table.packed, table.scale, table.zero_point = quantized.codes, quantized.scale[None], quantized.zero_point[None]
        assert torch.equal(table(torch.arange(3)), quantized.dequantize())

    @pytest.mark.parametrize("group_size", [4, 5])  # with and without planes
    def test_a_large_weight_is_multiplied_some_rows_at_a_time(
        self, monkeypatch: pytest.MonkeyPatch, group_size: int
    ) -> None:
        layer = linear_of(round_to_nearest(weights(7, 12, 0), 4, group_size), weights(1, 7, 1)[0])
        x, taken, weight = weights(6, 12, 2).view(2, 3, 12), [], layer.weight
        expected = layer(x)
        monkeypatch.setattr("thermo_lib.quant.layers._DENSE", 3 * 12)
        monkeypatch.setattr(layer, "weight", lambda rows: taken.append(rows) or weight(rows))
        torch.testing.assert_close(layer(x), expected)
        assert taken == [slice(0, 3), slice(3, 6), slice(6, 9)]

    def test_printing_a_layer_names_its_size_and_precision(self) -> None:
        layer = QuantizedLinear(6, 3, bits=2, group_size=4, bias=False, input_quantizer=DynamicRanges(8))
        assert "in_features=6, out_features=3, bits=2, group_size=4, activation_bits=8" in repr(layer)


class TestKeepingWeights:
    """Dequantized weights that are kept have the same bits, are made once, and go when they aren't asked for."""

    class Counting(QuantizedLinear):
        """Counts how often it dequantizes its weight."""

        made = 0

        def weight(self, rows: slice = slice(None)) -> Tensor:
            """See ``QuantizedLinear``."""
            self.made += 1
            return super().weight(rows)

    @pytest.fixture
    def layer(self) -> Counting:
        """A layer with a weight for each of two timesteps."""
        layer = self.Counting(8, 3, bits=2, group_size=4, bias=False, timesteps=2)
        layer.packed = pack(round_to_nearest(weights(3, 8, 0), 2, 4).codes, 2, 4)
        layer.scale = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)).half()
        layer.zero_point = torch.ones(2, 3, 2).half()
        layer.row_of_step = torch.tensor([0, 1], dtype=torch.int32)
        return layer

    @staticmethod
    def products(layer: QuantizedLinear) -> list[Tensor]:
        """At both timesteps, twice, of float32 and float64."""
        found = []
        for timestep in (0, 1, 0, 1):
            with denoising((timestep, 2)):
                found += [layer(weights(5, 8, 2).to(dtype)) for dtype in (torch.float32, torch.float64)]
        return found

    @torch.no_grad()
    def test_each_is_made_once(self, layer: Counting) -> None:
        plain = self.products(layer)
        assert layer.made == 8
        with keeping_weights([layer]):
            assert all(map(torch.equal, self.products(layer), plain))
            assert layer.made == 8 + 4
            layer.scale[1] *= 3  # is noticed
            assert not torch.equal(self.products(layer)[2], plain[2])
            assert layer.made == 8 + 4 + 4

    @torch.no_grad()
    def test_nothing_is_kept_afterwards(self, layer: Counting) -> None:
        layer._once("places", lambda: "kept")

        def stop() -> None:
            with keeping_weights([layer]):
                with keeping_weights([layer]):  # the outer one ends it
                    self.products(layer)
                assert len(layer._converted) == 1 + 4
                raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            stop()
        assert not layer.keeps_weight
        assert list(layer._converted) == ["places"]
        self.products(layer)
        assert layer.made == 4 + 8

    def test_gradients_see_the_weight_of_their_call(self, layer: Counting) -> None:
        with keeping_weights([layer]):
            self.products(layer)
        assert layer.made == 8


class TestNew:
    """What a new layer has room for, which a saved one is loaded into."""

    def shapes(self, layer: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()}

    @pytest.mark.parametrize("kind", [QuantizedLinear, TrellisLinear])
    def test_a_linear(self, kind: type[QuantizedLinear]) -> None:
        layer = kind(6, 3, bits=2, group_size=4, bias=True, timesteps=5)
        expected = {
            "packed": (torch.uint8, (3, 2)),
            "scale": (torch.float16, (1, 3, 2)),
            "zero_point": (torch.float16, (1, 3, 2)),
            "row_of_step": (torch.int32, (5,)),
            "bias": (torch.float32, (3,)),
        }
        if kind is TrellisLinear:
            expected["packed_column_bits"] = torch.uint8, (3,)
        assert self.shapes(layer) == expected
        assert torch.equal(layer(torch.ones(2, 6)), torch.zeros(2, 3))

    def test_an_embedding(self) -> None:
        table = QuantizedEmbedding(3, 6, bits=2, group_size=4, dtype=torch.float16)
        parameters = torch.float16, (1, 3, 2)
        assert self.shapes(table) == {"packed": (torch.uint8, (3, 2)), "scale": parameters, "zero_point": parameters}
        assert table(torch.arange(3)).dtype == table.dtype == torch.float16
        assert table.bfloat16().dtype == torch.bfloat16


class TestBias:
    """It is added as a dense layer adds it."""

    def layer(self, weight: Tensor, bias: Tensor) -> QuantizedLinear:
        return linear_of(round_to_nearest(weight, 4, 8), bias)

    @pytest.mark.parametrize("rows_at_a_time", [1, 2**20])
    def test_a_product_beyond_float16_that_the_bias_brings_back(
        self, monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int
    ) -> None:
        monkeypatch.setattr("thermo_lib.quant.planes._NUMBERS", 16 * rows_at_a_time)
        layer = self.layer(torch.full((3, 16), 2.0), torch.tensor([-3000.0, 0.0, -6000.0]))
        x = torch.zeros((1, 16), dtype=torch.float16)
        x[0, 0] = 33000
        dense = F.linear(x, layer.weight().half(), layer.bias.half())
        assert dense.isfinite().tolist() == [[True, False, True]]
        assert torch.equal(layer(x), dense)

    @pytest.mark.parametrize("group_size", [8, 16, 5])
    def test_autocast_decides_the_type(self, group_size: int) -> None:
        layer = linear_of(round_to_nearest(torch.randn(6, 16), 4, group_size), torch.ones(6))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(torch.randn(2, 16).bfloat16())
        assert found.dtype == torch.bfloat16
