"""A device that isn't there: tensors that claim to be on torch's lazy device, and have numbers.

They stand for tensors on a GPU. An operation that mixes them with tensors of the CPU fails, as it would there (a CPU
tensor without dimensions may be mixed in, as a number may); so does drawing random numbers for them from a generator of
the CPU. What moves from one device to the other is counted, and so are the bytes that are held at once.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy")
torch._register_device_module("lazy", ModuleType("torch.lazy"))  # torch.utils.checkpoint asks for one
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_SIZED = {torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default}  # waited for, to know their size


class Memory:
    """The bytes of the tensors on the pretended device; what an operation needs inside isn't known.

    Attributes:
        now, peak: at present, and at most since ``start``.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.holders: Counter[int] = Counter()

    def start(self) -> None:
        """Forget the peak."""
        self.peak = self.now

    def hold(self, tensor: "OnDevice") -> None:
        """Count a tensor until it is dropped; views of one memory count once."""
        memory = tensor.held.untyped_storage()
        place, size = memory.data_ptr(), memory.nbytes()
        if not self.holders[place]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.holders[place] += 1
        weakref.finalize(tensor, self.drop, place, size)

    def drop(self, place: int, size: int) -> None:
        """End what ``hold`` began."""
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.now -= size


MEMORY = Memory()


class OnDevice(Tensor):
    """A tensor on the pretended device, which holds its numbers on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held
        MEMORY.hold(made)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnDevice":
        if id(self) not in memo:
            copied = OnDevice(self.held.detach().clone())
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def tolist(self) -> list[Any]:
        """Its numbers, which are moved for it."""
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {}, Counter())


def of_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """What a function makes of the tensors in lists, tuples and dictionaries; torch's own takes most of the time."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([of_tensors(function, x) for x in value])
    if isinstance(value, dict):
        return {name: of_tensors(function, x) for name, x in value.items()}
    return value


def compute(func: Any, args: Any, kwargs: dict[str, Any], count: Counter[str]) -> Any:
    """Run an operation where its tensors are."""
    tensors: list[Tensor] = []

    def plain(x: Tensor) -> Tensor:
        tensors.append(x)
        return x.held if isinstance(x, OnDevice) else x

    held = of_tensors(plain, (args, kwargs))
    here = [x for x in tensors if isinstance(x, OnDevice)]
    target = kwargs.get("device")
    onto = target is not None and torch.device(target).type == DEVICE.type
    if func in _MOVES:
        return _move(func, args, kwargs, count, onto, target)
    if not here and not onto:
        return func(*args, **kwargs)
    other = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
    if other:
        found = ", ".join(f"{'device' if isinstance(x, OnDevice) else 'cpu'} {tuple(x.shape)}" for x in tensors)
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found {found}")
    if isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{func}: Expected a generator of the device, found one of cpu")
    if here and target is not None and not onto:
        raise RuntimeError(f"{func}: asked for {target} of tensors on the device")
    if func is torch.ops.aten._local_scalar_dense.default:
        count["read"] += 1
    if func in _SIZED and here:
        count["size"] += 1
    options = held[1] | ({"device": torch.device("cpu")} if onto else {})
    result = func(*held[0], **options)
    given = {id(x.held): x for x in here}

    return of_tensors(lambda x: given[id(x)] if id(x) in given else OnDevice(x), result)


def _move(func: Any, args: Any, kwargs: dict[str, Any], count: Counter[str], onto: bool, target: Any) -> Any:
    if func is torch.ops.aten.copy_.default:
        destination, source = args[:2]
        if isinstance(destination, OnDevice) != isinstance(source, OnDevice) and source.ndim:
            count["to device" if isinstance(destination, OnDevice) else "to cpu"] += 1
        plain = [x.held if isinstance(x, OnDevice) else x for x in (destination, source)]
        func(*plain, *args[2:], **kwargs)
        return destination
    source = args[0]
    plain = source.held if isinstance(source, OnDevice) else source
    options = {name: value for name, value in kwargs.items() if name != "device" or not onto}
    result = func(plain, **options)
    stays = isinstance(source, OnDevice) if target is None else onto
    if stays != isinstance(source, OnDevice):
        count["to device" if stays else "to cpu"] += 1
    return OnDevice(result) if stays else result


class PretendedDevice(TorchDispatchMode):
    """While it is entered (``with``), the lazy device has numbers.

    Attributes:
        count: how often something was moved ``to device`` or ``to cpu``, or a number ``read`` from the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {}, self.count)


def moved(module: nn.Module) -> nn.Module:
    """A module whose parameters and buffers are moved to the pretended device, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnDevice(parameter.detach().clone()), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer.clone())
    return module
