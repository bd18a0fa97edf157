"""Safetensors files of a model folder, and the checks of what they hold; pickles are never read."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from thermo_lib.files.reading import MOST_BYTES, brief, read_object

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FULL_PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What safetensors calls them. Numbers of less than a byte have other shapes in torch than in the file.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MOST_HEADER = 2**22  # bytes, of about 30,000 tensors; a million take a minute before one is found missing
_NO_ROOM = ("unable to mmap", "os error 12")
_LONGEST_NAME = 255  # bytes of a file's name on any usual file system
_PATIENCE = 1.0  # seconds without a bar
_PICKLES = ("*.bin", "*.pt", "*.pth")
CONVERT = (
    "pickled weights are never read; on a machine where you trust them: "
    f"safetensors.torch.save_file(torch.load(FILE, weights_only=True), '{WEIGHTS_NAME}', metadata={{'format': 'pt'}})"
)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """A folder's safetensors file or else the shards that its index names.

    Args:
        folder: of a model.
        variant: a word that ``transformers`` has in the names of other weights of the same model, e.g. ``fp16``.

    Raises:
        ValueError: no weights, pickled weights only, a file beside an index, shards without an index, a damaged index,
            or shards that hold something else than it says.
    """
    whole, index = (folder / _of_variant(name, variant) for name in (WEIGHTS_NAME, INDEX_NAME))
    if whole.is_file() and index.is_file():  # of two models, perhaps; transformers would take the file without a word
        found = f"found both {whole.name} and {index.name} in {folder}"
        raise ValueError(f"model: {found}, allowed is one of them; move away the one that isn't this model's")
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _shards(index)
    if shards := sorted(path.name for path in folder.glob("*.safetensors")):
        found = f"found {shards[0]} ({len(shards)} safetensors files in all) in {folder}"
        expected = f"expected {whole.name}, or the {index.name} that names them; copy it from where they are from"
        raise ValueError(f"model: {found}, but no index; {expected}")
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    hint = f"{pickled[0]} is a pickle, convert it: " if pickled else ""  # of a hub id, pickles aren't downloaded
    raise ValueError(f"model: found no {whole.name} in {folder}; {hint}{CONVERT}")


def _of_variant(name: str, variant: str | None) -> str:
    start, dot, end = name.rpartition(".")
    return name if variant is None else f"{start}.{variant}{dot}{end}"


def check_for_transformers(folder: Path, variant: str | None = None) -> None:
    """Raise ValueError for a folder that ``weight_files`` refuses, or whose index ``transformers`` fails at."""
    files, index = weight_files(folder, variant), folder / _of_variant(INDEX_NAME, variant)
    for path in files:
        with open_safetensors(path):  # which is smaller than the memory
            pass
    if index.is_file() and not isinstance(found := read_object(index, MOST_BYTES).get("metadata"), dict):
        raise ValueError(f"{index}: metadata: found {found!r:.80}, expected an object")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, no tensor in another or in more than it says."""
    weight_map = read_object(index, MOST_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "an empty object" if weight_map == {} else type(weight_map).__name__
        raise ValueError(f"{index}: weight_map: found {found}, expected an object from tensors to files")
    for tensor, name in weight_map.items():
        where = f"{index}: weight_map: {brief(tensor)}"
        allowed = f"allowed are files in {index.parent} that end in .safetensors"
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(f"{where}: found {name!r:.80}, {allowed}")
        if Path(name).name != name:
            raise ValueError(f"{where}: found shard {name!r:.300} outside the folder, {allowed}")
        if (size := len(os.fsencode(name))) > _LONGEST_NAME:
            raise ValueError(f"{where}: found a name of {size} bytes, allowed are {_LONGEST_NAME} at most")
    paths = [index.with_name(name) for name in sorted(set(weight_map.values()))]
    holder = dict(weight_map)
    for path in paths:
        if not path.is_file():
            raise ValueError(f"model: found no {path.name} in {path.parent}, which {index.name} names")
        with open_safetensors(path) as file:
            for tensor in file.keys():
                if holder.setdefault(tensor, path.name) != path.name:
                    found = f"found it in {path.name!r}, allowed is {holder[tensor]!r} alone"
                    raise ValueError(f"{index}: weight_map: {tensor}: {found}")
    return paths


def check_inside(paths: Sequence[Path], folder: Path) -> None:
    """Raise ValueError unless the files of a checkpoint are safetensors files in its folder."""
    for path in paths:
        if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
            raise ValueError(f"model: found shard {path} outside the folder, allowed are files in {folder}")
        if path.suffix != ".safetensors":
            raise ValueError(f"model: found {path.name} in {folder}, allowed are safetensors; {CONVERT}")


def read_headers(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Shapes and types of all tensors in files, as tensors on the meta device.

    Raises:
        ValueError: a file that isn't complete, or a tensor in two of them.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        with open_safetensors(path) as file:
            for name in file.keys():
                if name in found:
                    raise ValueError(f"{path}: tensor {name}: found it in another file too, allowed is one of them")
                part = file.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=type_of(part, name, path), device="meta")
    return found


def type_of(part: Any, name: str, path: Path) -> torch.dtype:
    """The type of a tensor in a file, of which nothing is read.

    Args:
        part: what ``get_slice`` gives.
        name: of the tensor.
        path: the file.

    Raises:
        ValueError: a type that no model here has, such as numbers of four bits.
    """
    if (found := part.get_dtype()) not in _TYPES:
        raise ValueError(f"{path}: tensor {name}: found {found}, allowed are {', '.join(_TYPES)}")
    return _TYPES[found]


def read_tensors(folder: Path, *, progress: bool = False) -> dict[str, Tensor]:
    """All tensors of a folder, perhaps with a bar; raises what ``weight_files`` and ``read_safetensors`` raise."""
    paths, found = weight_files(folder), {}
    with tqdm(total=sum(path.stat().st_size for path in paths), disable=not progress, **_bar("read")) as bar:
        for path in paths:
            with open_safetensors(path) as file:
                for name in file.keys():
                    found[name] = file.get_tensor(name)
                    bar.update(found[name].nbytes)
    return found


def _bar(text: str) -> dict[str, Any]:
    return {"desc": text, "unit": "B", "unit_scale": True, "leave": False, "delay": _PATIENCE}


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """A file to read single tensors from.

    Raises:
        ValueError: no such file, not a complete one, or one that is larger than the memory.
    """
    try:
        with path.open("rb") as header:
            if (length := int.from_bytes(header.read(8), "little")) > _MOST_HEADER:
                allowed = f"allowed are {_MOST_HEADER} at most"
                raise SafetensorError(f"found a header of {length} bytes, {allowed}")
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    except (MemoryError, RuntimeError) as error:
        if not any(reason in str(error) for reason in _NO_ROOM):
            raise
        found = f"found {path.stat().st_size / 2**30:.1f} GiB, more than this machine has memory for"
        raise ValueError(f"{path}: {found} ({error}); divide the weights into smaller files") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; raises what ``open_safetensors`` raises."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Path) -> None:
    """Compare names, shapes and finiteness of the tensors in a checkpoint with what the model needs.

    Raises:
        ValueError: a tensor is missing, extra, of the wrong shape, or holds NaN or infinity.
    """
    check_shapes({name: tensor.shape for name, tensor in found.items()}, expected, where)
    for name, tensor in found.items():
        check_finite(tensor, name, where)


def check_full_precision(dtype: torch.dtype, name: str, where: Path) -> None:
    """Raise ValueError if a tensor of a checkpoint is of a type that full-precision weights don't have."""
    if dtype not in FULL_PRECISION:
        allowed = ", ".join(str(dtype) for dtype in FULL_PRECISION)
        raise ValueError(f"{where}: tensor {name}: found {dtype}, allowed are {allowed}")


def check_dtype(dtype: Any) -> None:
    """Raise ValueError for a type that a model's weights can't have in memory."""
    if dtype not in FULL_PRECISION:
        allowed = ", ".join(str(each) for each in FULL_PRECISION)
        raise ValueError(f"dtype: found {dtype!r:.80}, allowed are {allowed}")


def check_finite(tensor: Tensor, name: str, where: Path) -> None:
    """Raise ValueError if a tensor of a checkpoint holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    numbers = tensor if tensor.dtype in FULL_PRECISION else tensor.float()  # 8-bit floats have no isfinite
    if not numbers.isfinite().all():
        raise ValueError(f"{where}: tensor {name}: found NaN or infinity, expected finite numbers")


def cast(
    tensors: dict[str, Tensor], dtype: torch.dtype, key: Callable[[str], str], where: Path, *, progress: bool = False
) -> None:
    """Give tensors of a checkpoint the type of a model, in their dictionary.

    Args:
        tensors: the library's name to floating tensor.
        dtype: of the model.
        key: what the checkpoint calls a name.
        where: the checkpoint.
        progress: show a bar.

    Raises:
        ValueError: a number that the type doesn't hold, or more numbers than the machine has memory for.
    """
    need = sum(tensor.numel() for tensor in tensors.values() if tensor.dtype != dtype) * dtype.itemsize
    if need > (most := _memory()):
        found = f"found weights of {need / 2**30:.1f} GiB in {dtype}, allowed are {most / 2**30:.1f} GiB, all there is"
        raise ValueError(f"{where}: memory: {found}; a smaller type, or quantize --layerwise, takes less")
    size = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=size, disable=not progress, **_bar("convert and check")) as bar:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype)
            check_finite(tensors[name], f"{key(name)} as {dtype}", where)
            bar.update(tensor.nbytes)


def _memory() -> int:
    """Bytes of memory and swap of this machine, used or not."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return sum(int(sizes[name].split()[0]) for name in ("MemTotal", "SwapTotal")) * 2**10


def check_shapes(found: Mapping[str, Sequence[int]], expected: Mapping[str, Tensor], where: Path) -> None:
    """Compare the names and shapes of the tensors in a checkpoint with what the model needs.

    Raises:
        ValueError: a tensor is missing, extra, or of the wrong shape.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise ValueError(f"{where}: missing tensors {', '.join(missing[:5])} ({len(missing)} in all)")
    if extra:
        raise ValueError(f"{where}: unexpected tensors {', '.join(extra[:5])} ({len(extra)} in all)")
    for name, shape in found.items():
        if tuple(shape) != tuple(expected[name].shape):
            shapes = f"found shape {tuple(shape)}, expected {tuple(expected[name].shape)}"
            raise ValueError(f"{where}: tensor {name}: {shapes}")
