"""Which code multiplies with a quantized weight: this is the place that chooses it, checks it and says what it chose.

``plain`` is torch alone and works everywhere; ``compiled`` is C++ on a CPU, or a loop by inductor (see ``planes`` and
``streams``); ``triton`` writes the weight once for all tokens, and so does ``cuda`` for trellis codes on NVIDIA GPUs;
``humming`` multiplies from the codes, on these too. Where each token of the input is quantized in one range, ``triton``
first tries to multiply its codes with the weight's, in int8: ``triton int8``. At the first use of a size each of these
four for GPUs is compared with the plain one: one that fails or is wrong isn't used.

``auto`` takes ``humming`` before ``triton``, but not for a weight that stays in the GPU's cache once it is written, and
more than 64 tokens. On an H200 with weights of 2 bits ``triton`` took 9 us and ``humming`` 16 for 3584 -> 512 and 256
tokens, 43 and 46 for 3584 -> 3584 and 1024; for larger weights ``humming`` was faster at every number of tokens.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thermo_lib.extras import needs
from thermo_lib.quant.calls import CALL, denoising

BACKENDS = ("auto", "plain", "compiled", "cuda", "triton", "humming")
_TRIED = {  # what is tried for what is asked, the fastest first
    "cuda": ("cuda",),
    "triton": ("triton int8", "triton"),
    "humming": ("humming",),
    "auto": ("triton int8", "humming", "cuda", "triton"),
}
_TRIED_IN_CACHE = ("triton int8", "cuda", "triton", "humming")  # by auto, for small weights and many tokens
_SMALL, _FEW = 2**24, 64  # weights of a layer, tokens
_MODULES = {"cuda": "cuda.bindings.nvrtc", "triton": "triton", "humming": "humming"}  # what they need
_HALVES = (torch.bfloat16, torch.float16)
_CLOSE = 0.02  # largest error of a product, as a share of its size, in any token
_FEWEST, _MOST = 5, 1024  # tokens of the product that is compared; kernels take other blocks for more of them
_SIZES = (1.0, -0.5, 0.75, -0.25)  # of the numbers in a token that has few of them, as shares of the largest
_LARGEST = 6e4  # in float16


class _Code(NamedTuple):
    """A way to multiply.

    Attributes:
        suits: whether it is for a layer and an input.
        product: the input times the layer's weight, plus a bias of the input's type, or None.
    """

    suits: Callable[[Any, Tensor], bool]
    product: Callable[[Any, Tensor, Tensor | None], Tensor]


def _on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels run where an input is: on a GPU, or anywhere under Triton's interpreter."""
    return x.dtype in _HALVES and (x.is_cuda or (_is_there("triton") and _is_interpreted())) and _is_there("triton")


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a written weight; with two dimensions the bias is added before the result is rounded."""
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def _for_triton(layer: Any, x: Tensor) -> bool:
    return layer.suits_triton() and _on_gpu(x)


def _by_triton(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return _dense(layer.quantized_input(x), layer.triton_weight(x.dtype), bias)


def _for_cuda(layer: Any, x: Tensor) -> bool:
    fits = layer.suits_cuda() and x.is_cuda and x.dtype in _HALVES and torch.version.hip is None
    return fits and torch.cuda.get_device_capability(x.device) >= (8, 0) and _is_there(_MODULES["cuda"])


def _by_cuda(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return _dense(layer.quantized_input(x), layer.cuda_weight(x.dtype), bias)


def _for_integer_triton(layer: Any, x: Tensor) -> bool:
    ranges = layer.input_quantizer
    has_codes = layer.has_planes and ranges is not None and ranges.is_by_token and ranges.bits <= 8
    if not has_codes or x.numel() == 0 or _needs_gradient(x) or not _on_gpu(x):
        return False
    from thermo_lib.quant.integer_kernels import NARROWEST

    return layer.packed.shape[1] // layer.scale.shape[-1] >= NARROWEST


def _by_integer_triton(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    found = layer.integer_triton(x).view(*x.shape[:-1], layer.out_features)
    return found if bias is None else found + bias


def _for_humming(layer: Any, x: Tensor) -> bool:
    fits = x.is_cuda and x.dtype in _HALVES and layer.has_planes and layer.group_size % 8 == 0
    fits = fits and layer.in_features % 64 == layer.out_features % 64 == 0
    return fits and not _needs_gradient(x) and _is_there("humming")


def _by_humming(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    tokens = layer.quantized_input(x).reshape(-1, x.shape[-1]).contiguous()
    found = layer.humming(x.dtype)(tokens).view(*x.shape[:-1], layer.out_features)
    return found if bias is None else found + bias


_CODE = {
    "cuda": _Code(_for_cuda, _by_cuda),
    "triton": _Code(_for_triton, _by_triton),
    "triton int8": _Code(_for_integer_triton, _by_integer_triton),
    "humming": _Code(_for_humming, _by_humming),
}


@functools.cache
def _is_there(module: str) -> bool:
    """Whether a package can be imported."""
    try:
        importlib.import_module(module)
    except Exception:  # humming looks for a GPU when it is imported
        return False
    return True


def _is_interpreted() -> bool:
    from thermo_lib.quant.triton_kernels import _planes

    return not isinstance(_planes, needs("triton").runtime.JITFunction)


def choose(layer: Any, x: Tensor) -> str:
    """The name of the code that multiplies an input with a layer's weight.

    Args:
        layer: a quantized linear; its ``backend`` is one of ``BACKENDS``.
        x: ``(..., in_features)``, before it is quantized.

    Returns:
        "plain", "compiled", "cuda", "triton", "triton int8" or "humming".
    """
    asked = layer.backend
    if asked == "compiled":
        return asked if x.dtype in _HALVES and layer.has_planes else "plain"
    if asked == "plain" or (asked == "auto" and not x.is_cuda):
        return "plain"
    is_small = layer.in_features * layer.out_features <= _SMALL
    in_cache = asked == "auto" and is_small and x.numel() > _FEW * layer.in_features
    tried = _TRIED_IN_CACHE if in_cache else _TRIED[asked]
    return next((name for name in tried if _CODE[name].suits(layer, x) and _is_right(name, layer, x)), "plain")


def product(name: str, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """An input, quantized as the layer does, times the layer's weight by what ``choose`` named.

    Args:
        name: any but "plain" and "compiled".
        layer: a quantized linear.
        x: ``(..., in_features)``, before it is quantized.
        bias: what is added, ``(out_features,)`` of the type of ``x``.

    Returns:
        ``(..., out_features)``.
    """
    return _CODE[name].product(layer, x, bias)


_found: dict[tuple[Any, ...], bool] = {}


@torch.no_grad()
def _is_right(name: str, layer: Any, x: Tensor) -> bool:
    """Whether a code's product is the plain one; asked once for each kind and size of layer and of input.

    Every token is compared by itself. One of them has a few numbers that are as large as the product allows in
    float16, and zeros elsewhere, so that a code that overflows on the way is found.
    """
    count = min(_MOST, max(_FEWEST, 1 << (x[..., 0].numel() - 1).bit_length()))
    ranges = layer.input_quantizer
    kind = type(layer), layer.bits, layer.group_size, type(ranges), layer.activation_bits
    key = name, *kind, layer.out_features, layer.in_features, x.dtype, x.device, count
    if key not in _found:
        try:
            weight = layer.weight()
            some = _tokens(weight, count).to(x.dtype)
            # Half of them are masked, where the ranges depend on it.
            with denoising(CALL.step, torch.arange(count, device=x.device) % 2 == 1, rows=()):
                quantized = layer.quantized_input(some.float())
                found = _CODE[name].product(layer, some, None).float()
            expected = F.linear(quantized, weight)
            # Terms may cancel out, in a few outputs all of them: then it is as large as terms of random signs come to.
            size = torch.maximum(expected.norm(dim=-1), F.linear(quantized**2, weight**2).sum(-1).sqrt())
            error = float(((found - expected).norm(dim=-1) / size.clamp(min=1e-30)).max())
            problem = "" if error < _CLOSE else f"its product is off by {error:.3g} of its size"
        except Exception as failure:  # whatever a compiler of kernels raises
            problem = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        _found[key] = not problem
        if problem:
            shape = f"{layer.in_features} -> {layer.out_features}"
            warnings.warn(f"backend: {name} isn't used for {shape} in {x.dtype}: {problem:.300}", stacklevel=2)
    return _found[key]


def _tokens(weight: Tensor, count: int) -> Tensor:
    """Tokens to compare products with a weight by, float32 ``(count, in_features)``: normal ones, and a large one."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((count, weight.shape[1]), generator=generator, dtype=torch.float32)
    few = torch.tensor(_SIZES[: weight.shape[1]], dtype=torch.float32)
    reach = max(float(weight.abs().max()) * float(few.abs().sum()), 1.0)
    tokens[1] = 0
    tokens[1, torch.arange(len(few)) * (weight.shape[1] // len(few))] = few * (_LARGEST / reach)
    return tokens.to(weight.device)


def backend(model: nn.Module) -> dict[str, str]:
    """What computes each quantized linear of a model: the code of its last call, or what was asked for before any.

    Args:
        model: e.g. ``lm.model``.

    Returns:
        Layer name to one of ``BACKENDS``, or to "triton int8".
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "backend")}
    return {name: layer.chosen or layer.backend for name, layer in layers.items()}


def set_backend(model: nn.Module, name: str) -> None:
    """Let the quantized linears of a model compute by one code; where it can't, or is wrong, they take the plain one.

    Args:
        model: e.g. ``lm.model``.
        name: one of ``BACKENDS``; ``auto`` takes the fastest that works on a GPU, and the plain one on a CPU.

    Raises:
        ValueError: another name, or a package that isn't installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: found {name!r}, allowed are {', '.join(BACKENDS)}")
    if name in _MODULES and not _is_there(_MODULES[name]):
        raise ValueError(f'backend: found no {name}; `pip install "thermo_lib[cuda]"` brings it')
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "backend")]
    for layer in layers:
        layer.backend, layer.chosen = name, None
