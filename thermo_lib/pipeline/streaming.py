"""Quantize a checkpoint in little memory: tensor by tensor, or block by block where calibration needs activations.

Weights are read from the safetensors shards, without calibration in the rows that are quantized together, and written
in shards again. A run that was stopped goes on after the last complete shard, or block.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

from thermo_lib.diffusion.prompts import Prompts
from thermo_lib.diffusion.states import Calibration
from thermo_lib.files.folders import keep_rights, only_writer, replace_folder
from thermo_lib.files.outputs import RUN_NAME, SNAPSHOTS_NAME, mark, output_folder, unfinished
from thermo_lib.files.reading import read_object
from thermo_lib.files.snapshots import digest, remove_damaged
from thermo_lib.files.tensors import INDEX_NAME, check_finite, check_full_precision, open_safetensors
from thermo_lib.files.text import write_json
from thermo_lib.files.whole import discard, make_folder, remove, replacing, sweep_inside, writing
from thermo_lib.models.architectures import MaskPredictor, skeleton
from thermo_lib.models.families import read_config, tensor_name
from thermo_lib.models.lm import check_unquantized, last_norm, model_folder
from thermo_lib.models.streamed import Checkpoint, load_streamed
from thermo_lib.models.tokenization import read_carried, read_chat_template, read_tokenizer, save_tokenizer
from thermo_lib.pipeline.cluster import run_on
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, coded_tables, linear_names, tables
from thermo_lib.pipeline.phases import first_starts
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import model_tensors, quantized_config_json
from thermo_lib.pipeline.weights import coded_weight

if TYPE_CHECKING:
    from distributed import Client

Item = TypeVar("Item")

_SHARDS = "shards"  # in RUN_NAME: the SHA-256 of each complete one
_KEPT = "complete shards are kept, the same call goes on after them"
_SHARD_BYTES = 2**29
_ROWS_BYTES = 2**26  # of the rows that are read at a time


@dataclass(frozen=True)
class _Task:
    """A tensor of the source.

    Attributes:
        key: its name there.
        name: the library's name.
        path: the file.
        shape: of the tensor.
        bits: of its codes; None where it is copied.
        size: about so many bytes are written for it.
    """

    key: str
    name: str
    path: Path
    shape: tuple[int, ...]
    bits: int | None
    size: int


def quantize_checkpoint(
    source: str | Path,
    output: str | Path,
    config: ThermoConfig,
    calibration: Calibration | None = None,
    *,
    family: str | None = None,
    block_length: int | None = None,
    prompts: Sequence[Prompts] | None = None,
    client: "Client | None" = None,
    shard_bytes: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> None:
    """Quantize a full-precision checkpoint into a folder that ``load_quantized`` reads.

    Until it is complete, the new folder is beside ``output`` under the name ``.<output>.partial``, and an earlier
    ``output`` stays as it was. A run that was stopped at any moment goes on from there with the same result; one that
    was stopped at its very end leaves a ``run.json`` in ``output``, which the same call removes. A shard or snapshot
    that isn't what was written, as after a power cut, is made anew.

    Args:
        source: a folder in the layout of a family, or a hub id.
        output: folder to write, see ``models.output_folder``; the only run that writes it.
        config: how to quantize.
        calibration: states for all but data-free weights, see ``calibrate``; of ``models.streamed.load_streamed``, or
            of the model in memory.
        family, block_length: see ``load_model``.
        prompts: see ``quantize``.
        client: of a ``dask.distributed`` cluster that writes the shards, without calibration; its machines see source
            and output under the same paths. A worker that is lost costs time only.
        shard_bytes: of a file that holds more than one tensor, at most; 512 MiB by default.
        device: where the work is done; a cluster has CPUs only. Under calibration it holds the head, one block and the
            hidden states that enter it, and what is quantized already; embeddings that aren't the head's, and more
            than 2 GiB of states, are in the host's memory.
        progress: show a bar.

    Raises:
        ValueError: a configuration that needs calibration and there is none; a damaged source, an output that may not
            be replaced or that another run is writing, or an unfinished run of another source, configuration or
            calibration.
        OSError: no space left, no right to write, no worker, every worker that tried a shard was lost, or the
            scheduler was or doesn't answer any more.
    """
    if config.needs_calibration:
        if calibration is None:
            raise ValueError(
                f"calibration: found None, required by {config.needs_calibration}; the preset 'fast' needs none"
            )
        if client is not None:
            raise ValueError(f"client: found one, allowed is None with quantizer={config.quantizer!r}, block by block")
    if client is not None and torch.device(device).type != "cpu":
        raise ValueError(f"device: found {device}, allowed is cpu on a cluster")
    folder = model_folder(str(source)).absolute()
    output = output_folder(output, folder)
    with only_writer(output):
        where = torch.device(device)
        size = shard_bytes or _SHARD_BYTES
        _quantize(folder, output, config, calibration, (family, block_length), prompts, client, size, where, progress)


def _quantize(
    folder: Path,
    output: Path,
    config: ThermoConfig,
    calibration: Calibration | None,
    kind: tuple[str | None, int | None],
    prompts: Sequence[Prompts] | None,
    client: "Client | None",
    shard_bytes: int,
    device: torch.device,
    progress: bool,
) -> None:
    """``quantize_checkpoint`` after its checks, as the only writer of the output; ``kind``: family, block length."""
    model_config = read_config(folder, *kind)
    check_unquantized(folder)
    model = skeleton(model_config)
    coded_tables(model, config)  # which refuses those that can't be coded
    checkpoint = Checkpoint(folder, model)
    tokenizer, chat_template = read_tokenizer(folder, model_config.vocab_size), read_chat_template(folder)
    carried = read_carried(folder)
    partial = unfinished(output, "partial")
    run = _run(checkpoint, config, calibration, prompts) | {"shard size": shard_bytes}
    if calibration is not None and device.type == "cuda":
        run |= {"card": torch.cuda.get_device_name(device), "products": torch.backends.cuda.matmul.fp32_precision}
    if _is_done(output, run):
        _finish(output, partial)
        return
    digests = _begin(output, partial, run)
    paths = _complete_shards(partial, digests)
    if config.needs_calibration and not paths:
        lm = load_streamed(str(folder), family=kind[0], block_length=kind[1], device=device)
        snapshots = partial / SNAPSHOTS_NAME
        remove_damaged(snapshots)
        quantized = quantize(lm, config, calibration, prompts=prompts, resume=snapshots, progress=progress)
        tensors = _as_stored(quantized, checkpoint)
        shards = _shards(list(tensors), lambda name: tensors[name].nbytes, shard_bytes)
        paths = _shard_paths(partial, len(shards))
        for names, path in zip(shards, paths, strict=True):
            if not _is_whole(path, digests):
                digests[path.name] = _write(path, {name: tensors[name] for name in names})
                _record(partial, run, digests)
    elif not config.needs_calibration:
        tasks = _shards(_tasks(checkpoint, model, config), lambda task: task.size, shard_bytes)
        paths = _shard_paths(partial, len(tasks))
        size = sum(task.size for shard in tasks for task in shard)
        with tqdm(total=size, desc="quantize", unit="B", unit_scale=True, disable=not progress) as bar:
            for number, found in _written(tasks, paths, digests, model_config, config, client, device):
                if digests.get(paths[number].name) != found:
                    digests[paths[number].name] = found
                    _record(partial, run, digests)
                bar.update(sum(task.size for task in tasks[number]))
    weight_map: dict[str, str] = {}
    for path in paths:
        with open_safetensors(path) as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    total = sum((partial / name).stat().st_size for name in set(weight_map.values()))
    with writing(partial, _KEPT):
        write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        text = quantized_config_json(model_config, config, _stored_norm(partial, weight_map, model_config).dtype)
        (partial / "config.json").write_text(text, encoding="utf-8")
        save_tokenizer(tokenizer, chat_template, partial, carried)
        remove(partial / SNAPSHOTS_NAME, wholly=True)
        sweep_inside(partial)
        output_folder(output, folder)  # once more: it may have changed meanwhile, and so may the new one
        remove(output / RUN_NAME)  # of an earlier run, which would be seen as unfinished in the new one's place
        mark(partial, digest(run))
        replace_folder(output, partial)  # with run.json in it, so that a run that is stopped here has nothing to redo
    _finish(output, partial)


def _stored_norm(folder: Path, weight_map: Mapping[str, str], config: PreTrainedConfig) -> Tensor:
    """A norm's weight, which training may have changed."""
    name = last_norm(config, weight_map)
    with open_safetensors(folder / weight_map[name]) as file:
        return file.get_tensor(name)


def _as_stored(lm: QuantizedLM, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What is stored of a quantized model, by the checkpoint's names; what wasn't changed in the checkpoint's type."""
    found = {}
    for name, tensor in model_tensors(lm).items():
        if name in checkpoint.tensors:
            stored = checkpoint.read(name)
            tensor = stored if torch.equal(stored.to(tensor.dtype), tensor.cpu()) else tensor
        found[tensor_name(lm.model.config, name)] = tensor
    return found


def _complete_shards(folder: Path, digests: Mapping[str, str]) -> list[Path]:
    """The shards in a folder, if all are there and whole."""
    paths = sorted(folder.glob("model-*-of-*.safetensors"))
    is_complete = paths == _shard_paths(folder, len(paths)) and all(_is_whole(path, digests) for path in paths)
    return paths if is_complete else []


def _is_whole(path: Path, digests: Mapping[str, str]) -> bool:
    """Whether a shard is there as it was written."""
    return path.is_file() and digests.get(path.name) == _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _is_done(output: Path, run: Mapping[str, Any]) -> bool:
    """Whether the same run was stopped after it had put its result in place, and before its end."""
    return _differing(output, run) == []


def _differing(folder: Path, run: Mapping[str, Any]) -> list[str] | None:
    """What another run is of that a folder is of; None where it is of none that can be read."""
    path = folder / RUN_NAME
    try:
        found = read_object(path) if path.is_file() else None
    except ValueError:  # damaged
        return None
    if found is None:
        return None
    found.pop(_SHARDS, None)
    return sorted(key for key in found.keys() | run.keys() if found.get(key) != run.get(key))


def _finish(output: Path, partial: Path) -> None:
    """Remove what a run leaves when its result is in place."""
    with writing(output):
        discard(partial, output)
        (output / RUN_NAME).unlink()


def _tasks(checkpoint: Checkpoint, model: MaskPredictor, config: ThermoConfig) -> list[_Task]:
    """The tensors of a checkpoint, file by file; the model needs no weights."""
    linears = {f"{name}.weight" for name in linear_names(model)}
    coded = {f"{name}.weight" for name in tables(model)} if config.embedding_bits < 16 else set()
    tasks = []
    for name, stored in checkpoint.tensors.items():
        count = math.prod(stored.shape)
        bits = config.bit_width if name in linears else config.embedding_bits if name in coded else None
        packed = 0 if bits is None else count * bits // 8 + 4 * count // (config.group_size or stored.shape[-1])
        size = count * stored.itemsize if bits is None else packed
        tasks.append(_Task(stored.key, name, stored.path, stored.shape, bits, size))
    return tasks


def _shards(items: Sequence[Item], size: Callable[[Item], int], most: int) -> list[list[Item]]:
    """What is written to one file each: neighbours of at most so many bytes, or a single one."""
    shards: list[list[Item]] = [[]]
    for item in items:
        if shards[-1] and sum(map(size, shards[-1])) + size(item) > most:
            shards.append([])
        shards[-1].append(item)
    return shards


def _rows(file: safe_open, task: _Task) -> Iterator[Tensor]:
    """A tensor in parts of its rows."""
    part = file.get_slice(task.key)
    check_full_precision(part[:1].dtype, task.key, task.path)
    if len(task.shape) < 2:
        yield part[:]
        return
    step = max(1, _ROWS_BYTES // (4 * task.shape[1]))
    for start in range(0, task.shape[0], step):
        yield part[start : start + step]


def _stored(
    task: _Task, model_config: PreTrainedConfig, config: ThermoConfig, device: torch.device
) -> dict[str, Tensor]:
    """What is stored of a tensor, by the checkpoint's names."""
    with open_safetensors(task.path) as file:
        if task.bits is None:
            part = file.get_slice(task.key)
            whole, start = torch.empty(task.shape, dtype=part[:1].dtype), 0
            for rows in _rows(file, task):
                check_finite(rows, task.key, task.path)
                whole[start : start + len(rows)] = rows
                start += len(rows)
            return {task.key: whole}
        coded = [coded_weight(rows.to(device), task.key, config, task.bits) for rows in _rows(file, task)]
    name = task.name.removesuffix(".weight")
    return {
        tensor_name(model_config, f"{name}.{key}"): torch.cat([part[key] for part in coded], dim=-2) for key in coded[0]
    }


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a shard; its digest."""
    with replacing(path, _KEPT) as new:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, new, metadata={"format": "pt"})
    return _digest(path)


def _write_shard(
    path: Path,
    shard: list[_Task],
    digests: Mapping[str, str],
    model_config: PreTrainedConfig,
    config: ThermoConfig,
    device: torch.device,
) -> str:
    """Write a shard of what needs no calibration, unless it is there; its digest."""
    if _is_whole(path, digests):
        return digests[path.name]
    return _write(path, {key: t for task in shard for key, t in _stored(task, model_config, config, device).items()})


def _written(
    shards: list[list[_Task]],
    paths: list[Path],
    digests: Mapping[str, str],
    model_config: PreTrainedConfig,
    config: ThermoConfig,
    client: "Client | None",
    device: torch.device,
) -> Iterator[tuple[int, str]]:
    """Write what is missing of the shards, and yield number and digest of each as soon as it is there."""
    if client is None:
        for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
            yield number, _write_shard(path, shard, digests, model_config, config, device)
        return
    absolute = [path.absolute() for path in paths]
    arguments = (dict(digests), model_config, config, device)
    calls = [partial(_write_shard, p, s, *arguments) for s, p in zip(shards, absolute, strict=True)]
    for number, found in run_on(client, calls, _KEPT):
        if not paths[number].is_file():
            raise OSError(f"output: found no {absolute[number]}, which a worker wrote on its own file system")
        yield number, found


def _run(
    checkpoint: Checkpoint, config: ThermoConfig, calibration: Calibration | None, prompts: Sequence[Prompts] | None
) -> dict[str, Any]:
    """What the result of a run depends on."""
    run: dict[str, Any] = {"configuration": config.model_dump(mode="json"), "format version": config.format_version}
    if calibration is not None:
        run["calibration"] = [digest(calibration.tensors()), calibration.timesteps, calibration.source]
        run["number of threads"] = torch.get_num_threads()  # sums are added up in another order
        run["torch version"] = str(torch.__version__)
    if prompts is not None:
        run["prompts"] = digest(first_starts(prompts, config.seed))
    return run | checkpoint.identity()


def _begin(output: Path, partial: Path, run: dict[str, Any]) -> dict[str, str]:
    """Make the working folder, or go on in it if it is of the same run; ``output_folder`` has looked at what is there.

    Returns:
        The name of each shard that it has to its digest.
    """
    changed = _differing(partial, run)
    if changed:
        found = f"found an unfinished run of another {', '.join(changed)} in {partial}"
        raise ValueError(f"output: {found}; delete that folder, or bring back what has changed")
    if changed is not None:
        digests = read_object(partial / RUN_NAME).get(_SHARDS)
        return digests if isinstance(digests, dict) else {}
    with writing(partial / RUN_NAME, "an earlier output is as it was"):
        discard(partial, output)  # of a run that was stopped before its first file, or damaged
        make_folder(partial)
        keep_rights(output, partial)
        _record(partial, run, {})
    return {}


def _record(partial: Path, run: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Note which shards are complete."""
    with writing(partial, _KEPT):
        write_json(partial / RUN_NAME, {**run, _SHARDS: digests})
