"""What computes a product: the kernels against the plain code over odd sizes, and who is chosen where one fails.

Triton's kernels run under its interpreter, on the CPU; it cuts bfloat16 off where a GPU rounds.
"""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrices import random_trellis
from torch import Tensor, nn

from thermo_lib import backend, set_backend
from thermo_lib.quant import backends
from thermo_lib.quant.calls import denoising
from thermo_lib.quant.codes import BIT_WIDTHS, pack
from thermo_lib.quant.layers import QuantizedLinear, TrellisLinear
from thermo_lib.quant.trellis import MOST_BITS

pytestmark = pytest.mark.usefixtures("nothing_is_known")
Interpreted = dict[str, ModuleType]
IN_FEATURES, OUT_FEATURES = (1, 31, 100, 768), (1, 48, 50)
TOKENS = (0, 1, 2, 31, 65, 127, 129, 257)
CLOSE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 0.0}


def planes_layer(rows: int, columns: int, bits: int, group_size: int, extreme: bool = False, seed: int = 0):
    """Random codes; ``extreme``: all of them the smallest or the largest, and zero points beyond both ends."""
    generator = torch.Generator().manual_seed(seed)
    layer = QuantizedLinear(columns, rows, bits=bits, group_size=group_size, bias=False)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    if extreme:
        codes = (codes % 2) * (2**bits - 1)
    layer.packed = pack(codes, bits, group_size)
    layer.scale = (torch.rand(layer.scale.shape, generator=generator) + 0.01).half()
    ends = torch.tensor([-3.0, 0.0, 2.0**bits - 1, 2.0**bits + 3])
    drawn = torch.randint(4, layer.scale.shape, generator=generator)
    layer.zero_point = (ends[drawn] if extreme else torch.rand(drawn.shape, generator=generator) * 2**bits).half()
    return layer


def trellis_layer(rows: int, columns: int, group_size: int, most: int = MOST_BITS, seed: int = 0) -> TrellisLinear:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, most + 1, (columns,), generator=generator, dtype=torch.uint8)
    bits[0] = max(1, int(bits[0]))  # a row without any bits is no bytes
    return random_trellis(bits, rows, group_size, generator)


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn((tokens, columns), generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CLOSE)
@given(
    rows=st.sampled_from(OUT_FEATURES),
    group=st.sampled_from([(768, 768), (768, 32), (768, 64), (100, 20), (64, 8), (12, 4), (8, 8)]),
    bits=st.sampled_from(BIT_WIDTHS),
    extreme=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None)
def test_planes_are_the_plain_weight(
    interpreted: Interpreted, dtype: torch.dtype, rows: int, group: tuple[int, int], bits: int, extreme: bool, seed: int
) -> None:
    columns, group_size = group
    layer = planes_layer(rows, columns, bits, group_size, extreme, seed)
    assert layer.has_planes
    found = layer.triton_weight(dtype)
    assert (found.dtype, found.shape) == (dtype, (rows, columns))
    torch.testing.assert_close(found.float(), layer.weight(), rtol=CLOSE[dtype], atol=1e-6 if CLOSE[dtype] else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CLOSE)
@given(
    rows=st.sampled_from(OUT_FEATURES),
    columns=st.sampled_from(IN_FEATURES),
    group_size=st.sampled_from([7, 32, 64, 10**6]),
    most=st.sampled_from([1, 2, MOST_BITS]),
    seed=st.integers(0, 2**31),
)
@example(rows=3, columns=13, group_size=7, most=2, seed=0)  # two groups meet inside a block
@settings(max_examples=10, deadline=None)
def test_streams_are_the_plain_weight(
    interpreted: Interpreted, dtype: torch.dtype, rows: int, columns: int, group_size: int, most: int, seed: int
) -> None:
    layer = trellis_layer(rows, columns, group_size, most, seed)
    found = layer.triton_weight(dtype)
    assert (found.dtype, found.shape) == (dtype, (rows, columns))
    torch.testing.assert_close(found.float(), layer.weight(), rtol=CLOSE[dtype], atol=1e-6 if CLOSE[dtype] else 0)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 1, 31, 129])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["planes", "trellis"])
def test_products_are_the_plain_ones(interpreted: Interpreted, tokens: int, dtype: torch.dtype, kind: str) -> None:
    layer = planes_layer(50, 96, 2, 32) if kind == "planes" else trellis_layer(50, 96, 32)
    layer.bias = torch.arange(50, dtype=dtype)
    x = inputs(tokens, 96, dtype)
    expected = layer(x)
    assert layer.chosen == "plain"
    set_backend(layer, "triton")
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.3)
    assert layer.chosen == "triton"
    strided = inputs(2 * tokens, 96, dtype)[::2]
    torch.testing.assert_close(layer(strided.unflatten(0, (1, -1))), layer(strided)[None])


def test_every_timestep_has_its_weight(interpreted: Interpreted) -> None:
    layer = planes_layer(5, 64, 2, 32)
    layer.scale = torch.cat([layer.scale, 2 * layer.scale])
    layer.zero_point = layer.zero_point.repeat(2, 1, 1)
    layer.row_of_step = torch.arange(2, dtype=torch.int32)
    set_backend(layer, "triton")
    x, products = inputs(3, 64, torch.bfloat16), []
    for timestep in range(2):
        with denoising((timestep, 2)):
            products.append(layer(x))
    assert torch.equal(products[1], 2 * products[0])


def test_gradients_pass_through(interpreted: Interpreted) -> None:
    layer, x = trellis_layer(5, 40, 8), inputs(3, 40, torch.bfloat16).requires_grad_()
    set_backend(layer, "triton")
    layer(x).sum().backward()
    expected = layer.weight().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.03, atol=0.1)


class TestChoice:
    """Which code is taken, and what is said of it."""

    def test_on_a_cpu_it_is_the_plain_one(self) -> None:
        model = nn.Sequential(planes_layer(4, 32, 2, 16), nn.ReLU(), trellis_layer(3, 4, 4))
        assert backend(model) == {"0": "auto", "2": "auto"}
        model(inputs(2, 32, torch.bfloat16))
        assert backend(model) == {"0": "plain", "2": "plain"}
        assert "bits=2, group_size=16, activation_bits=16, backend=plain" in repr(model)

    def test_what_isnt_for_a_kernel_is_plain(self, interpreted: Interpreted) -> None:
        odd, layer = planes_layer(4, 30, 2, 6), planes_layer(4, 32, 2, 16)
        assert not odd.has_planes
        for model, x in ((odd, inputs(2, 30, torch.bfloat16)), (layer, inputs(2, 32, torch.float32))):
            set_backend(model, "triton")
            assert torch.equal(model(x), F.linear(x, model.weight().to(x.dtype)))
            assert backend(model) == {"": "plain"}

    @pytest.mark.parametrize("fault", ["wrong", "not a number", "raises"])
    def test_a_wrong_kernel_is_named_and_not_used(
        self, interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        layer, x = planes_layer(6, 64, 2, 32), inputs(3, 64, torch.bfloat16)
        expected, weight = layer(x), layer.triton_weight
        calls = []

        def faulty(dtype: torch.dtype) -> Tensor:
            calls.append(dtype)
            if fault == "raises":
                raise RuntimeError("no kernel for this card\nmore")
            found = weight(dtype)
            return -found if fault == "wrong" else found * float("nan")

        monkeypatch.setattr(layer, "triton_weight", faulty)
        set_backend(layer, "triton")
        reason = {"raises": "RuntimeError: no kernel for this card$"}.get(fault, "its product is off by ([12]|nan)")
        with pytest.warns(UserWarning, match=f"backend: triton isn't used for 64 -> 6 in torch.bfloat16: {reason}"):
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
        assert (backend(layer), calls) == ({"": "plain"}, [torch.bfloat16])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_kernel_that_overflows_inside_is_found(
        self, interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        """It is right for inputs of usual size, and the exact product of the large ones is a number in float16."""
        layer = planes_layer(6, 64, 2, 32)
        layer.scale /= 100
        sizes = []

        def overflows(layer: QuantizedLinear, x: Tensor, bias: None = None) -> Tensor:
            sizes.append(x.abs().amax(-1))
            partly = F.linear(x.float(), layer.weight() * 64).half()  # scaled back when it is too late
            return (partly.float() / 64).to(x.dtype)

        monkeypatch.setitem(backends._CODE, "triton", backends._Code(lambda *_: True, overflows))
        set_backend(layer, "triton")
        x = inputs(3, 64, dtype)
        with pytest.warns(UserWarning, match="triton isn't used for 64 -> 6 .* its product is off by inf of its size"):
            layer(x)
        assert layer.chosen == "plain"
        assert sizes[0][1] > 5e4
        assert sizes[0][[0, 2, 3, 4]].max() < 10
        assert F.linear(backends._tokens(layer.weight(), 5), layer.weight()).abs().max() < 6e4
        assert overflows(layer, x).isfinite().all()

    def test_one_wrong_token_is_found(self, interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
        """Among many, whose errors are small, and beside one that is large."""
        layer = planes_layer(6, 64, 2, 32)

        def wrong(layer: QuantizedLinear, x: Tensor, bias: None) -> Tensor:
            product = F.linear(x, layer.weight().to(x.dtype))
            product[-1] *= 1.5
            return product

        monkeypatch.setitem(backends._CODE, "triton", backends._Code(lambda *_: True, wrong))
        set_backend(layer, "triton")
        with pytest.warns(UserWarning, match="its product is off by 0.[2-5]"):
            layer(inputs(128, 64, torch.bfloat16))

    def test_other_blocks_are_compared_anew(self, interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kernel for more tokens is another kernel."""
        layer, counts = planes_layer(6, 64, 2, 32), []

        def product(layer: QuantizedLinear, x: Tensor, bias: None) -> Tensor:
            counts.append(len(x))
            return F.linear(x, layer.weight().to(x.dtype))

        monkeypatch.setitem(backends._CODE, "triton", backends._Code(lambda *_: True, product))
        set_backend(layer, "triton")
        for tokens in (1, 4, 33, 60, 1000, 2000):
            layer(inputs(tokens, 64, torch.bfloat16))
        assert counts == [5, 1, 4, 64, 33, 60, 1024, 1000, 2000]

    @pytest.mark.parametrize(
        ("out_features", "tokens", "suited", "expected"),
        [
            (4096, 64, {"triton", "humming"}, "humming"),
            (4096, 65, {"triton", "humming"}, "triton"),
            (4096, 65, {"humming"}, "humming"),
            (4096, 65, {"cuda", "triton"}, "cuda"),
            (4096, 65, {"triton int8", "triton", "humming"}, "triton int8"),
            (4160, 65, {"triton", "humming"}, "humming"),
            (4160, 65, {"triton int8", "humming"}, "triton int8"),
        ],
    )
    def test_small_weights_are_written_for_many_tokens(
        self, monkeypatch: pytest.MonkeyPatch, out_features: int, tokens: int, suited: set[str], expected: str
    ) -> None:
        for name, code in backends._CODE.items():
            monkeypatch.setitem(backends._CODE, name, code._replace(suits=lambda *_, name=name: name in suited))
        monkeypatch.setattr(backends, "_is_right", lambda *_: True)

        class OnGpu(Tensor):
            is_cuda = True

        layer = QuantizedLinear(4096, out_features, bits=2, group_size=64, bias=False)
        x = torch.zeros((1, tokens, 4096), dtype=torch.bfloat16).as_subclass(OnGpu)
        assert backends.choose(layer, x) == expected
        layer.backend = "humming"
        assert backends.choose(layer, x) == ("humming" if "humming" in suited else "plain")

    @pytest.mark.parametrize(
        ("in_features", "out_features", "group_size", "suits"),
        [(128, 192, 64, True), (128, 130, 64, False), (96, 128, 32, False), (192, 64, 12, False), (64, 64, 8, True)],
    )
    def test_humming_is_for_blocks_of_64(
        self, monkeypatch: pytest.MonkeyPatch, in_features: int, out_features: int, group_size: int, suits: bool
    ) -> None:
        class OnGpu(Tensor):
            is_cuda = True

        monkeypatch.setattr(backends, "_is_there", lambda name: name == "humming")
        layer = QuantizedLinear(in_features, out_features, bits=2, group_size=group_size, bias=False)
        x = torch.zeros((3, in_features), dtype=torch.bfloat16).as_subclass(OnGpu)
        assert backends._for_humming(layer, x) == suits

    def test_a_name_that_isnt_known_or_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = planes_layer(4, 32, 2, 16)
        with pytest.raises(ValueError, match="backend: found 'fast', allowed are auto, plain, compiled, cuda, triton"):
            set_backend(layer, "fast")
        monkeypatch.setattr(backends, "_is_there", lambda name: False)
        with pytest.raises(ValueError, match=r"backend: found no humming; `pip install \"thermo_lib\[cuda\]\"`"):
            set_backend(layer, "humming")
        assert layer.backend == "auto"

    def test_a_weight_is_converted_once_and_again_when_it_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What humming is given, and when; its own code needs a GPU."""
        from thermo_lib.quant import humming_kernels

        given = []

        def convert(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, dtype: torch.dtype):
            given.append((bits, group_size, dtype))
            dense = (codes.view(len(codes), -1, group_size) - zero[..., None]) * scale[..., None]
            return lambda x: F.linear(x, dense.flatten(1).to(dtype))

        monkeypatch.setattr(humming_kernels, "humming_product", convert)
        layer, x = planes_layer(6, 64, 2, 32), inputs(3, 64, torch.bfloat16)
        for _ in range(2):
            found = backends.product("humming", layer, x[None])
        torch.testing.assert_close(found, layer(x)[None], rtol=0.02, atol=0.1)
        assert given == [(2, 32, torch.bfloat16)]
        layer.scale = layer.scale * 2
        torch.testing.assert_close(backends.product("humming", layer, x), 2 * found[0], rtol=0.02, atol=0.1)
        assert len(given) == 2
        assert not backends._for_humming(layer, x), "it is for CUDA"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["auto", "cuda", "triton", "humming"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_on_a_gpu(name: str, tokens: int) -> None:
    for layer in (planes_layer(48, 768, 2, 32), planes_layer(48, 768, 4, 64), trellis_layer(48, 768, 10**6)):
        for dtype in (torch.bfloat16, torch.float16):
            x = inputs(tokens, 768, dtype)
            expected = F.linear(x.float(), layer.weight())
            there = layer.to("cuda")
            if name != "humming" or backends._is_there("humming"):
                set_backend(there, name)
            torch.testing.assert_close(there(x.cuda()).cpu().float(), expected, rtol=0.02, atol=1.0)
            layer.to("cpu")
