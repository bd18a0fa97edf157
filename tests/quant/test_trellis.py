"""Trellis-coded weights: the stream's layout, the codebook, where bits go, and that the search does what it says."""

import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermo_lib.quant.codes import pack
from thermo_lib.quant.gptq import gptq
from thermo_lib.quant.layers import TrellisLinear
from thermo_lib.quant.trellis import (
    _SEARCHED,
    MOST_BITS,
    STATE_BITS,
    TrellisWeight,
    _searched,
    allocate_bits,
    codebook,
    column_costs,
    gains,
    pack_symbols,
    read_states,
    refit_scales,
    trellis,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(columns: int, seed: int = 0) -> Tensor:
    """Of correlated inputs, far from diagonal."""
    inputs = random(4 * columns, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return (inputs.T @ inputs).double()


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """``tr(E H E^T)``."""
    error = (weight - other).double()
    return float(torch.einsum("oi,ij,oj->", error, hessian, error))


def bits(*counts: int) -> Tensor:
    """Bits of columns."""
    return torch.tensor(counts, dtype=torch.uint8)


column_bits = st.lists(st.integers(0, MOST_BITS), min_size=1, max_size=40)


class TestStream:
    """A row is its codes one after the other; a state is the last bits up to a column."""

    @given(column_bits, st.integers(0, 1000))
    def test_states_are_the_last_bits_written(self, counts: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        symbols = torch.stack([torch.randint(0, 2**k, (3,), generator=generator) for k in counts], 1)
        packed = pack_symbols(symbols.to(torch.uint8), bits(*counts))
        assert packed.shape == (3, math.ceil(sum(counts) / 8))
        found = read_states(packed, bits(*counts))
        state = torch.zeros(3, dtype=torch.int64)
        for column, count in enumerate(counts):
            state = (state * 2**count + symbols[:, column]) % 2**STATE_BITS
            assert torch.equal(found[:, column].long(), state)

    def test_golden(self) -> None:
        # 01 | (no bits) | 110 | 1010 | padding: 0111 0101 0000 0000
        symbols = torch.tensor([[1, 0, 6, 10]], dtype=torch.uint8)
        packed = pack_symbols(symbols, bits(2, 0, 3, 4))
        assert packed.tolist() == [[0b01110101, 0b00000000]]
        assert read_states(packed, bits(2, 0, 3, 4)).tolist() == [[0b01, 0b01, 0b01110, 0b011101010]]


class TestCodebook:
    """The quantiles of a standard normal distribution, shuffled."""

    def test_its_values_are_normal_and_float16(self) -> None:
        values = codebook()
        assert len(values) == 2**STATE_BITS
        assert torch.equal(values, values.half().float())
        assert values.mean().abs() < 1e-3
        assert values.std() == pytest.approx(1, abs=0.01)
        quantile = (torch.arange(len(values)) + 0.5) / len(values)
        torch.testing.assert_close(torch.special.ndtr(values.sort().values), quantile, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("count", range(1, MOST_BITS + 1))
    def test_the_successors_of_every_state_divide_the_distribution_evenly(self, count: int) -> None:
        successors = (torch.arange(2**STATE_BITS)[:, None] * 2**count + torch.arange(2**count)) % 2**STATE_BITS
        part = (torch.special.ndtr(codebook()[successors].double()) * 2**count).long()
        assert torch.equal(part.sort(1).values, torch.arange(2**count).expand(len(part), -1))

    def test_neighbours_in_the_stream_say_little_about_a_value(self) -> None:
        states = torch.arange(2**STATE_BITS)
        for symbol in range(4):
            following = codebook()[(states * 4 + symbol) % 2**STATE_BITS]
            assert torch.corrcoef(torch.stack([codebook(), following]))[0, 1].abs() < 0.05


class TestAllocation:
    """Each bit goes where it saves most."""

    @given(st.integers(0, 1000), st.floats(1.0, 5.0))
    def test_no_exchange_of_two_bits_saves_anything(self, seed: int, average: float) -> None:
        costs = {"a": random(12, seed=seed).exp().double(), "b": random(7, seed=seed + 1).mul(3).exp().double()}
        rows = {"a": 4, "b": 4}
        found = allocate_bits(costs, rows, average)
        cost, count = torch.cat(list(costs.values())), torch.cat(list(found.values())).long()
        saved = torch.where(count > 1, cost * 0.25 ** (count - 1.0), torch.inf)  # by the last bit of each column
        gained = torch.where(count < MOST_BITS, cost * 0.25**count, 0)  # by one more
        assert saved.min() >= gained.max() * (1 - 1e-12)
        assert int(count.sum()) == min(int(average * 19 * 4) // 4, 19 * MOST_BITS)

    def test_wide_columns_pay_for_all_their_rows(self) -> None:
        # The same cost of a column, four times the rows: a second bit in wide columns saves as much a weight as a third
        # in narrow ones, and less than a second there. Of the budget of 24 bits beyond the first, 16 are narrow.
        found = allocate_bits({"narrow": torch.ones(4), "wide": torch.ones(4)}, {"narrow": 2, "wide": 8}, 1.6)
        assert found["narrow"].tolist() == [3, 3, 3, 3]
        assert found["wide"].tolist() == [2, 1, 1, 1]
        assert all(bits.dtype == torch.uint8 for bits in found.values())

    @pytest.mark.parametrize("average", [0.0, 0.9, MOST_BITS + 0.1])
    def test_an_average_out_of_range_is_refused(self, average: float) -> None:
        with pytest.raises(ValueError, match=r"average_bits: found .*, allowed are 1\.\.6"):
            allocate_bits({"a": torch.ones(3)}, {"a": 1}, average)

    def test_costs_are_what_errors_cost(self) -> None:
        # One column changed by e and the rest free to follow costs e^2 / Hinv_ii^2 in the order of the columns.
        weight, hessian = random(5, 6), hessian_of(6)
        costs = column_costs(weight, hessian, damping=0.0)
        inner = hessian[1:, 1:]
        schur = hessian[0, 0] - hessian[0, 1:] @ torch.linalg.solve(inner, hessian[1:, 0])
        assert float(costs[0]) == pytest.approx(float(schur * weight.double().square().sum() / 6), rel=1e-6)


class TestSearch:
    """The least squared output error among what can be written."""

    def every_row(self, counts: tuple[int, ...], columns: int) -> Tensor:
        """All rows that a stream can stand for, ``(streams, columns)``."""
        choices = list(itertools.product(*(range(2**count) for count in counts)))
        packed = pack_symbols(torch.tensor(choices, dtype=torch.uint8), bits(*counts))
        return codebook()[read_states(packed, bits(*counts))] * gains(bits(*counts))

    @pytest.mark.parametrize("counts", [(2, 2, 2, 2, 2), (1, 3, 0, 2, 4)])
    def test_a_wide_beam_finds_the_best_of_all_streams(self, counts: tuple[int, ...]) -> None:
        weight, hessian = random(4, 5), hessian_of(5)
        found = trellis(weight, hessian, bits(*counts), group_size=5, damping=0.0, beam=10_000)
        rms = weight.square().mean(1, keepdim=True).sqrt().half().float()  # what the search scales the codebook with
        candidates = self.every_row(counts, 5)
        for row in range(4):
            errors = [output_error(weight[row, None], rms[row] * c[None], hessian) for c in candidates]
            assert torch.equal(found.codes()[row], candidates[errors.index(min(errors))])

    def test_a_wider_beam_is_better(self) -> None:
        weight, hessian = random(32, 96), hessian_of(96)
        counts = torch.full((96,), 2, dtype=torch.uint8)
        errors = [
            output_error(weight, trellis(weight, hessian, counts, 96, 0.01, beam).dequantize(), hessian)
            for beam in (1, 8, 64)
        ]
        assert errors[2] < 0.8 * errors[1] < 0.64 * errors[0]

    def test_it_is_nearer_than_gptq_with_fewer_bits(self) -> None:
        weight, hessian = random(64, 128), hessian_of(128)
        scalar = gptq(weight, hessian, 2, 128, damping=0.01, ridge=0.0)  # 2.25 bits all in
        coded = trellis(weight, hessian, torch.full((128,), 2), 128, damping=0.01, beam=64)  # 2.125
        error = output_error(weight, coded.dequantize(), hessian)
        assert error < 0.75 * output_error(weight, scalar.dequantize(), hessian)

    def test_independent_weights_are_near_the_rate_distortion_bound(self) -> None:
        # 4^-2 = 0.0625 is the bound, 0.1175 the best of four levels (Max 1960).
        weight = random(64, 256)
        coded = trellis(weight, torch.eye(256), torch.full((256,), 2), 256, damping=0.0, beam=64)
        error = float((weight - coded.dequantize()).square().mean() / weight.square().mean())
        assert 0.0625 < error < 0.085

    def test_better_placed_bits_are_better(self) -> None:
        weight, hessian = random(32, 64), hessian_of(64)
        hessian *= torch.logspace(0, 3, 64).sqrt().outer(torch.logspace(0, 3, 64).sqrt())
        spread = allocate_bits({"w": column_costs(weight, hessian, 0.01)}, {"w": 32}, 2.0)["w"]
        even = torch.full((64,), 2, dtype=torch.uint8)
        assert spread.sum() == even.sum()
        errors = [
            output_error(weight, trellis(weight, hessian, c, 64, 0.01, 16).dequantize(), hessian)
            for c in (spread, even)
        ]
        assert errors[0] < 0.7 * errors[1]

    def test_a_gpu_searches_as_many_rows_as_it_has_room_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = {"mem_get_info": (100 * 2**30, 141 * 2**30), "memory_reserved": 2**33, "memory_allocated": 2**32}
        for name, size in memory.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
        assert _searched(torch.device("cuda", 0)) == 5 * 2**30
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
        assert _searched(torch.device("cuda", 0)) == 6 * 2**25
        assert _searched(torch.device("cpu")) == _SEARCHED

    def test_rows_that_are_searched_apart_are_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, hessian, counts = random(10, 40), hessian_of(40), torch.full((40,), 2)
        whole = trellis(weight, hessian, counts, 40, 0.01, 8)
        monkeypatch.setattr("thermo_lib.quant.trellis._SEARCHED", 8 * 40 * 3)
        apart = trellis(weight, hessian, counts, 40, 0.01, 8)
        assert torch.equal(whole.packed, apart.packed)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"column_bits": torch.full((5,), 2)},
                r"column_bits: found shape \(5,\) in 2\.\.2, allowed is \(6,\) in 0\.\.6",
            ),
            ({"column_bits": torch.full((6,), 7)}, r"column_bits: found .* in 7\.\.7"),
            ({"beam": 0}, "beam: found 0, allowed is at least 1"),
            ({"hessian": torch.eye(5)}, r"hessian: found shape \(5, 5\), expected \(6, 6\)"),
            ({"weight": torch.full((2, 6), math.nan)}, "weight: found NaN"),
        ],
    )
    def test_bad_input_is_named(self, changes: dict[str, object], message: str) -> None:
        given = {"weight": random(2, 6), "hessian": torch.eye(6), "column_bits": torch.full((6,), 2), "beam": 4}
        with pytest.raises(ValueError, match=message):
            trellis(**{**given, **changes}, group_size=6, damping=0.01)


class TestScales:
    """Scales are fitted for the output error."""

    @pytest.fixture
    def coded(self) -> TrellisWeight:
        """Eleven columns in groups of four."""
        return trellis(random(6, 11), hessian_of(11), torch.full((11,), 2), group_size=4, damping=0.01, beam=8)

    def test_no_other_scales_are_better(self, coded: TrellisWeight) -> None:
        weight, hessian = random(6, 11), hessian_of(11)
        best = output_error(weight, coded.dequantize(), hessian)
        for seed in range(20):
            scale = (coded.scale.float() * (1 + 0.05 * random(6, 3, seed=seed))).half()
            other = TrellisWeight(coded.packed, coded.column_bits, scale, 4)
            assert output_error(weight, other.dequantize(), hessian) > 0.999 * best

    def test_a_group_without_bits_keeps_its_scale(self) -> None:
        weight, counts = random(3, 8), bits(2, 2, 2, 2, 0, 0, 0, 0)
        coded = trellis(weight, hessian_of(8), counts, group_size=4, damping=0.01, beam=8)
        assert torch.equal(coded.scale[:, 1], weight[:, 4:].square().mean(1).sqrt().half())
        assert (coded.dequantize()[:, 4:] == 0).all()

    def test_a_scale_stays_positive(self) -> None:
        weight = random(3, 8)
        coded = trellis(weight, torch.eye(8), torch.full((8,), 2), group_size=8, damping=0.01, beam=8)
        refitted = refit_scales(-weight, coded, torch.eye(8))
        assert torch.equal(refitted.scale, coded.scale)

    @pytest.mark.parametrize("change", ["some rows at a time", "float32"])
    def test_they_are_fitted_in_parts_and_in_float32_as_on_a_gpu(
        self, coded: TrellisWeight, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        weight, hessian = random(6, 11), hessian_of(11)
        start = TrellisWeight(coded.packed, coded.column_bits, (2 * coded.scale.float()).half(), 4)
        if change == "float32":
            monkeypatch.setattr("thermo_lib.quant.trellis.fit_precision", lambda device: torch.float32)
        else:
            monkeypatch.setattr("thermo_lib.quant.trellis._REFITTED", 2 * 11 * 3)
        assert not torch.equal(start.scale, coded.scale)
        torch.testing.assert_close(refit_scales(weight, start, hessian).scale, coded.scale, rtol=2e-3, atol=0)


def test_the_layer_computes_with_the_stored_weight(random_ids: Callable[..., Tensor]) -> None:
    counts = bits(*[2, 0, 3, 1, 4, 2, 6] * 3)
    coded = trellis(random(5, 21), hessian_of(21), counts, group_size=8, damping=0.01, beam=8)
    layer = TrellisLinear(21, 5, bits=2, group_size=8, bias=True)
    layer.packed, layer.packed_column_bits = coded.packed, pack(coded.column_bits, 4)
    layer.scale, layer.zero_point = coded.scale[None], torch.zeros_like(coded.scale)[None]
    layer.bias = random(5, seed=3)
    x = random(2, 7, 21, seed=4)
    torch.testing.assert_close(layer(x), x @ coded.dequantize().T + layer.bias)


def test_the_page_on_the_format_has_the_codebook_s_digest() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    assert hashlib.sha256(codebook().numpy().astype("<f4").tobytes()).hexdigest() in page


def test_the_codebook_is_where_the_codes_are() -> None:
    layer = TrellisLinear(6, 3, bits=2, group_size=6, bias=False).to("meta")
    assert layer.codes().device.type == "meta"
