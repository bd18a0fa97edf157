"""Quantize a checkpoint in little memory: tensor by tensor, or block by block where calibration needs activations.

Weights are read from the safetensors shards, without calibration in the rows that are quantized together, and written
in shards again. A run that was stopped goes on after the last complete shard.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

from thermo_lib.diffusion.states import Calibration, calibrate
from thermo_lib.extras import needs
from thermo_lib.files.folders import only_writer, output_folder, remove, replace_folder, unfinished, writing
from thermo_lib.files.snapshots import Snapshot, digest
from thermo_lib.files.tensors import (
    INDEX_NAME,
    check_finite,
    check_full_precision,
    check_shapes,
    open_safetensors,
    weight_files,
)
from thermo_lib.files.text import read_object, write_json
from thermo_lib.models.architectures import MaskPredictor, skeleton
from thermo_lib.models.families import HEAD, read_config, stored_names, tensor_name
from thermo_lib.models.lm import DiffusionLM, check_unquantized, model_folder
from thermo_lib.models.tokenization import (
    TOKENIZER_FILES,
    read_carried,
    read_chat_template,
    read_tokenizer,
    save_tokenizer,
)
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.layerwise import check_layerwise, coded_blocks
from thermo_lib.pipeline.model import TABLES, QuantizedLM, linear_names
from thermo_lib.pipeline.storage import quantized_config_json
from thermo_lib.pipeline.weights import coded_weight

if TYPE_CHECKING:
    from distributed import Client

RUN_NAME = "run.json"
STATES_NAME = "states.safetensors"
_KEPT = "complete shards are kept, the same call goes on after them"
_SHARD_BYTES = 2**29
_ROWS_BYTES = 2**26  # of the rows that are read at a time
_WORKER_SECONDS = 60  # for the first worker of a cluster to come


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
    client: "Client | None" = None,
    shard_bytes: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> None:
    """Quantize a full-precision checkpoint into a folder that ``load_quantized`` reads.

    Until it is complete, the new folder is beside ``output`` under the name ``.<output>.partial``, and an earlier
    ``output`` stays as it was. A run that was stopped at any moment goes on from there with the same result; one that
    was stopped at its very end leaves a ``run.json`` in ``output``, which the same call removes.

    Args:
        source: a folder in the layout of Dream or LLaDA, or a hub id.
        output: folder to write, see ``models.output_folder``; the only run that writes it.
        config: how to quantize; with calibration, what ``layerwise.check_layerwise`` allows.
        calibration: states for ``gptq``, ``trellis`` and time groups, e.g. by the forward process, see
            ``calibration_states``.
        client: of a ``dask.distributed`` cluster that writes the shards, without calibration; its machines see source
            and output under the same paths. A worker that is lost costs time only.
        shard_bytes: of a file that holds more than one tensor, at most; 512 MiB by default.
        device: where the work is done, a block and the hidden states that enter it at a time; a cluster has CPUs only.
        progress: show a bar.

    Raises:
        ValueError: a configuration that needs calibration and there is none, or that needs the whole model; a damaged
            source, an output that may not be replaced or that another run is writing, or an unfinished run of another
            source, configuration or calibration.
        OSError: no space left, no right to write, no worker, every worker that tried a shard was lost, or the
            scheduler was.
    """
    if config.needs_calibration:
        check_layerwise(config)
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
        _quantize(folder, output, config, calibration, client, shard_bytes or _SHARD_BYTES, where, progress)


def _quantize(
    folder: Path,
    output: Path,
    config: ThermoConfig,
    calibration: Calibration | None,
    client: "Client | None",
    shard_bytes: int,
    device: torch.device,
    progress: bool,
) -> None:
    """``quantize_checkpoint`` after its checks, as the only writer of the output."""
    model_config = read_config(folder)
    check_unquantized(folder)
    tasks = _tasks(folder, model_config, config)
    tokenizer, chat_template = read_tokenizer(folder, model_config.vocab_size), read_chat_template(folder)
    carried = read_carried(folder)
    partial = unfinished(output, "partial")
    run = _run(folder, config, calibration) | {"shard size": shard_bytes}
    if _is_done(output, run):
        _finish(output, partial)
        return
    _begin(partial, run)
    blocks = _by_block(tasks) if config.needs_calibration else []
    inside = {task.key for block in blocks for task in block}
    shards = blocks + _shards([task for task in tasks if task.key not in inside], shard_bytes)
    paths = [partial / f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    with tqdm(
        total=sum(t.size for t in tasks), desc="quantize", unit="B", unit_scale=True, disable=not progress
    ) as bar:
        if not all(path.is_file() for path in paths[: len(blocks)]):
            rough = config.replace(enable_boundary_smoothing=False)  # as ``quantize`` fits
            model = _skeleton(model_config, device)
            lm = QuantizedLM(model, tokenizer, model_config.mask_token_id, str(folder), rough)
            snapshot = Snapshot(partial / STATES_NAME, digest(run))
            for number, tensors in coded_blocks(lm, _reader(tasks, device), calibration, snapshot):
                bar.n = sum(task.size for block in blocks[: number + 1] for task in block)
                bar.refresh()
                if not paths[number].is_file():
                    _write(paths[number], {tensor_name(model_config, name): t for name, t in tensors.items()})
        bar.reset()
        for number in _written(shards, paths, model_config, config, client, device):
            bar.update(sum(task.size for task in shards[number]))
    weight_map: dict[str, str] = {}
    for path in paths:
        with open_safetensors(path) as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    total = sum((partial / name).stat().st_size for name in set(weight_map.values()))
    with writing(partial, _KEPT):
        write_json(partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        text = quantized_config_json(model_config, config, _reader(tasks)("model.norm.weight").dtype)
        (partial / "config.json").write_text(text, encoding="utf-8")
        save_tokenizer(tokenizer, chat_template, partial, carried)
        for leftover in [partial / STATES_NAME, *partial.glob("*.tmp"), *partial.glob(".*.tmp"), output / RUN_NAME]:
            leftover.unlink(missing_ok=True)
        replace_folder(output, partial)  # with run.json in it, so that a run that is stopped here has nothing to redo
    _finish(output, partial)


def _is_done(output: Path, run: Mapping[str, Any]) -> bool:
    """Whether the same run was stopped after it had put its result in place, and before its end."""
    try:
        return (output / RUN_NAME).is_file() and read_object(output / RUN_NAME) == run
    except ValueError:
        return False


def _finish(output: Path, partial: Path) -> None:
    """Remove what a run leaves when its result is in place."""
    with writing(output):
        remove(partial)
        (output / RUN_NAME).unlink()


def _skeleton(model_config: PreTrainedConfig, device: torch.device | str = "cpu") -> MaskPredictor:
    """A model without weights: only its position embeddings, which no checkpoint holds, are there, on a device."""
    model = skeleton(model_config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model_config).to(device)
    return model.eval()


def calibration_states(
    source: str | Path,
    timesteps: int,
    count: int | None = None,
    seed: int = 0,
    batches: Callable[[DiffusionLM], list[tuple[Tensor, Tensor | None]]] | None = None,
) -> Calibration:
    """Calibration states that need no weights: text, masked by the forward process at every timestep's ratio.

    Args:
        source: a folder in the layout of Dream or LLaDA, or a hub id.
        timesteps: ``T``.
        count: number of states of each length, spread evenly over the timesteps; None for all there are.
        seed: of the text and of the masks.
        batches: makes the text of the model, which has no weights; None for the project's, see
            ``states.calibration_batches``.
    """
    folder = model_folder(str(source))
    model_config = read_config(folder)
    tokenizer = read_tokenizer(folder, model_config.vocab_size)
    about = tokenizer, model_config.mask_token_id, str(source)
    lm = DiffusionLM(_skeleton(model_config), *about, chat_template=read_chat_template(folder))
    own = {} if batches is None else {"batches": batches(lm)}
    whole = calibrate(lm, timesteps=timesteps, source="forward", seed=seed, **own)
    most = min(len(part.ids) for part in whole.parts)
    if count is None:
        return whole
    if not 1 <= count <= most:
        raise ValueError(f"states: found {count}, allowed are 1..{most}")
    parts = (part[torch.arange(count) * len(part.ids) // count] for part in whole.parts)
    return Calibration(tuple(parts), timesteps, "forward")


def _by_block(tasks: list[_Task]) -> list[list[_Task]]:
    """The linears of each block."""
    blocks: dict[int, list[_Task]] = {}
    for task in tasks:
        if task.bits is not None and ".layers." in task.name:
            blocks.setdefault(int(task.name.split(".")[2]), []).append(task)
    return [blocks[number] for number in sorted(blocks)]


def _reader(tasks: list[_Task], device: torch.device | str = "cpu") -> Callable[[str], Tensor]:
    """Reads a tensor by the library's name, to a device."""
    known = {task.name: task for task in tasks}

    def read(name: str) -> Tensor:
        with open_safetensors(known[name].path) as file:
            tensor = file.get_tensor(known[name].key)
        check_full_precision(tensor.dtype, known[name].key, known[name].path)
        check_finite(tensor, known[name].key, known[name].path)
        return tensor.to(device)

    return read


def _tasks(folder: Path, model_config: PreTrainedConfig, config: ThermoConfig) -> list[_Task]:
    """The tensors of a checkpoint, file by file; their names and shapes are those that the model needs."""
    model = _skeleton(model_config)
    expected = model.state_dict()
    found: dict[str, tuple[Path, list[int], int]] = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            for key in sorted(file.keys()):
                part = file.get_slice(key)
                found[key] = path, part.get_shape(), _itemsize(part.get_dtype())
    names = stored_names(found, model_config, expected)
    check_shapes(
        {key: shape for key, (_, shape, _) in found.items()}, {k: expected[n] for k, n in names.items()}, folder
    )
    linears = {f"{name}.weight" for name in linear_names(model)}
    tables = {f"{name}.weight" for name in TABLES} if config.embedding_bits < 16 else set()
    tasks = []
    for key, (path, shape, itemsize) in found.items():
        name, count = names[key], 1
        if name == HEAD and model_config.tie_word_embeddings:
            continue  # a copy of the embeddings, whatever it holds
        for length in shape:
            count *= length
        bits = config.bit_width if name in linears else config.embedding_bits if name in tables else None
        size = count * itemsize if bits is None else count * bits // 8 + 4 * count // (config.group_size or shape[-1])
        tasks.append(_Task(key, name, path, tuple(shape), bits, size))
    return tasks


def _itemsize(dtype: str) -> int:
    """Bytes of a number, from a safetensors type such as ``BF16``."""
    return int("".join(c for c in dtype if c.isdigit()) or 8) // 8


def _shards(tasks: list[_Task], most: int) -> list[list[_Task]]:
    """Tasks whose results are written to one file."""
    shards: list[list[_Task]] = [[]]
    for task in tasks:
        if shards[-1] and sum(t.size for t in shards[-1]) + task.size > most:
            shards.append([])
        shards[-1].append(task)
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


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # a cluster may work on one shard twice
    with writing(path, _KEPT):
        try:
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)
            os.replace(temporary, path)
        except (SafetensorError, OSError):
            temporary.unlink(missing_ok=True)
            raise


def _write_shard(
    path: Path, shard: list[_Task], model_config: PreTrainedConfig, config: ThermoConfig, device: torch.device
) -> None:
    """Write a shard of what needs no calibration, unless it is there."""
    if not path.is_file():
        _write(path, {key: t for task in shard for key, t in _stored(task, model_config, config, device).items()})


def _written(
    shards: list[list[_Task]],
    paths: list[Path],
    model_config: PreTrainedConfig,
    config: ThermoConfig,
    client: "Client | None",
    device: torch.device,
) -> Iterator[int]:
    """Write what is missing of the shards, and yield the number of each as soon as it is there."""
    if client is None:
        for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
            _write_shard(path, shard, model_config, config, device)
            yield number
        return
    as_completed = needs("distributed").as_completed
    from distributed.comm import CommClosedError
    from distributed.scheduler import KilledWorker

    absolute = [path.absolute() for path in paths]
    futures: dict[Any, int] = {}
    try:
        client.wait_for_workers(1, timeout=_WORKER_SECONDS)
        for number, (shard, path) in enumerate(zip(shards, absolute, strict=True)):
            futures[client.submit(_write_shard, path, shard, model_config, config, device, pure=False)] = number
        for future in as_completed(futures):
            future.result()
            if not paths[futures[future]].is_file():
                raise OSError(
                    f"output: found no {absolute[futures[future]]}, which a worker wrote on its own file system"
                )
            yield futures[future]
    except TimeoutError as error:
        raise OSError(f"scheduler: found no worker in {_WORKER_SECONDS} s, allowed is at least one; {_KEPT}") from error
    except KilledWorker as error:
        raise OSError(f"scheduler: every worker that tried a shard was lost ({error}); {_KEPT}") from error
    except (CancelledError, CommClosedError) as error:
        raise OSError(f"scheduler: the scheduler was lost ({error}); {_KEPT}") from error
    finally:
        with suppress(CancelledError, OSError):  # from a scheduler that was lost
            client.cancel(list(futures))


def _run(folder: Path, config: ThermoConfig, calibration: Calibration | None) -> dict[str, Any]:
    """What the result of a run depends on.

    Weights are known by their file's size, time and header: other numbers under the same size and time aren't noticed,
    and the same file with another time is taken for another.
    """
    run: dict[str, Any] = {"configuration": config.model_dump(mode="json"), "format version": config.format_version}
    if calibration is not None:
        run["calibration"] = [digest(calibration.tensors()), calibration.timesteps, calibration.source]
        run["number of threads"] = torch.get_num_threads()  # sums are added up in another order
        run["torch version"] = str(torch.__version__)
    for path in [folder / "config.json", *(folder / name for name in TOKENIZER_FILES)]:
        if path.is_file():
            run[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in weight_files(folder):
        about = path.stat()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            start = hashlib.sha256(file.read(min(8 + length, about.st_size))).hexdigest()
        run[path.name] = [about.st_size, about.st_mtime_ns, start]
    return run


def _begin(partial: Path, run: dict[str, Any]) -> None:
    """Make the working folder, or go on in it if it is of the same run."""
    path = partial / RUN_NAME
    if path.is_file():
        earlier = read_object(path)
        changed = sorted(key for key in earlier.keys() | run.keys() if earlier.get(key) != run.get(key))
        if changed:
            found = f"found an unfinished run of another {', '.join(changed)} in {partial}"
            raise ValueError(f"output: {found}; delete that folder, or bring back what has changed")
        return
    with writing(path, "an earlier output is as it was"):
        remove(partial)  # of a run that was stopped before its first file
        partial.mkdir()
        write_json(path, run)
