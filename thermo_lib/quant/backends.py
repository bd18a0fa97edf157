"""Which code multiplies with a quantized weight: this is the place that chooses it, checks it and says what it chose.

``plain`` is torch alone and works everywhere; ``compiled`` is C++ on a CPU, or a loop by inductor (see ``planes`` and
``streams``); ``triton`` writes the weight once for all tokens; ``humming`` multiplies from the codes, on CUDA. At the
first use of a size each of the last two is compared with the plain one: one that fails or is wrong isn't used.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("auto", "plain", "compiled", "triton", "humming")
_BY_DEVICE = {"cuda": ("humming", "triton")}  # what is tried for "auto", the fastest first; elsewhere it is plain
_HALVES = (torch.bfloat16, torch.float16)
_CLOSE = 0.02  # largest error of a product, as a share of its size
_TOKENS = 5  # of the product that is compared


class _Code(NamedTuple):
    """A way to multiply.

    Attributes:
        suits: whether it is for a layer and an input.
        product: the input times the layer's weight, without the bias.
    """

    suits: Callable[[Any, Tensor], bool]
    product: Callable[[Any, Tensor], Tensor]


def _for_triton(layer: Any, x: Tensor) -> bool:
    on_gpu = x.is_cuda or (_is_there("triton") and _is_interpreted())
    return on_gpu and x.dtype in _HALVES and layer.suits_triton() and _is_there("triton")


def _by_triton(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.triton_weight(x.dtype))


def _for_humming(layer: Any, x: Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    fits = x.is_cuda and x.dtype in _HALVES and not needs_gradient and layer.has_planes and layer.group_size % 8 == 0
    return fits and _is_there("humming")


def _by_humming(layer: Any, x: Tensor) -> Tensor:
    return layer.humming(x.dtype)(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], layer.out_features)


_CODE = {"triton": _Code(_for_triton, _by_triton), "humming": _Code(_for_humming, _by_humming)}


@functools.cache
def _is_there(module: str) -> bool:
    """Whether a package can be imported."""
    try:
        importlib.import_module(module)
    except Exception:  # humming looks for a GPU when it is imported
        return False
    return True


def _is_interpreted() -> bool:
    from thermo_lib.quant.triton_kernels import _planes, triton

    return not isinstance(_planes, triton.runtime.JITFunction)


def choose(layer: Any, x: Tensor) -> str:
    """The name of the code that multiplies an input with a layer's weight.

    Args:
        layer: a quantized linear; its ``backend`` is one of ``BACKENDS``.
        x: ``(..., in_features)``.
    """
    asked = layer.backend
    if asked == "compiled":
        return asked if x.dtype in _HALVES and layer.has_planes else "plain"
    for name in _BY_DEVICE.get(x.device.type, ()) if asked == "auto" else (asked,):
        if name in _CODE and _CODE[name].suits(layer, x) and _is_right(name, layer, x):
            return name
    return "plain"


def product(name: str, layer: Any, x: Tensor) -> Tensor:
    """``x (..., in_features)`` times a layer's weight by ``triton`` or ``humming``, ``(..., out_features)``."""
    return _CODE[name].product(layer, x)


_found: dict[tuple[Any, ...], bool] = {}


@torch.no_grad()
def _is_right(name: str, layer: Any, x: Tensor) -> bool:
    """Whether a code's product is the plain one; asked once for each kind and size of layer, type and device."""
    key = name, type(layer), layer.out_features, layer.in_features, layer.bits, layer.group_size, x.dtype, x.device
    if key not in _found:
        generator = torch.Generator().manual_seed(0)
        some = torch.randn((_TOKENS, layer.in_features), generator=generator, dtype=torch.float32).to(x.device, x.dtype)
        try:
            expected = F.linear(some.float(), layer.weight())
            error = (_CODE[name].product(layer, some).float() - expected).norm() / expected.norm().clamp(min=1e-30)
            problem = "" if float(error) < _CLOSE else f"its product is off by {float(error):.3g} of its size"
        except Exception as failure:  # whatever a compiler of kernels raises
            problem = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        _found[key] = not problem
        if problem:
            size = f"{layer.in_features} -> {layer.out_features}"
            warnings.warn(f"backend: {name} isn't used for {size} in {x.dtype}: {problem:.300}", stacklevel=2)
    return _found[key]


def backend(model: nn.Module) -> dict[str, str]:
    """What computes each quantized linear of a model: the code of its last call, or what was asked for before any.

    Args:
        model: e.g. ``lm.model``.

    Returns:
        Layer name to one of ``BACKENDS``.
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
    if name in _CODE and not _is_there(name):
        raise ValueError(f'backend: found no {name}; `pip install "thermo_lib[cuda]"` brings it')
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend, module.chosen = name, None
