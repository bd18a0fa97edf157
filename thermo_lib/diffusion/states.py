"""Calibration states: what the model sees while it denoises, per timestep, with each token's state.

A state is a sequence with some positions masked, at a timestep. ``forward`` takes them from the forward
process (mask held text at the schedule's ratio), ``trajectory`` from the full-precision model's own
ancestral denoising, which is where a quantized model will be used.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thermo_lib.data import corpus
from thermo_lib.data.corpus import held_out_sequences
from thermo_lib.data.puzzles import TASK_LENGTH, TASKS, encode_puzzles, knows_tasks, make_puzzles
from thermo_lib.data.texts import text_sequences
from thermo_lib.diffusion.cut import cut_to_blocks
from thermo_lib.diffusion.sampling import generate, mask_ratios, mask_tokens
from thermo_lib.files.reading import brief, field_of, parse_json, shown
from thermo_lib.files.whole import replacing
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.loaded import as_lm

Source = Literal["forward", "trajectory"]
SOURCES: tuple[Source, ...] = ("forward", "trajectory")
_FIELDS = {"ids": torch.int64, "is_masked": torch.bool, "timestep": torch.int64, "clean": torch.int64}
_BLOCKS = 4  # of a block-causal model's texts that are denoised: as many lengths of states


@dataclass(frozen=True)
class States:
    """Masked sequences of one length, each at a timestep.

    Attributes:
        ids: int64 ``(states, length)``, mask tokens at masked positions.
        is_masked: bool ``(states, length)``, the token state.
        timestep: int64 ``(states,)``.
        clean: int64 ``(states, length)``, the text that the states lead to.
    """

    ids: Tensor
    is_masked: Tensor
    timestep: Tensor
    clean: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or not len(self.ids):
            raise ValueError(
                f"calibration: found states of shape {tuple(self.ids.shape)}, allowed is at least one state"
            )
        for name in ("is_masked", "clean"):
            found = getattr(self, name).shape
            if found != self.ids.shape:
                raise ValueError(f"calibration: {name}: found shape {tuple(found)}, expected {tuple(self.ids.shape)}")
        if self.timestep.shape != self.ids.shape[:1]:
            raise ValueError(
                f"calibration: timestep: found shape {tuple(self.timestep.shape)}, expected ({len(self.ids)},)"
            )
        for name, dtype in _FIELDS.items():
            if (found_type := getattr(self, name).dtype) != dtype:
                raise ValueError(f"calibration: {name}: found {found_type}, allowed is {dtype}")

    def to(self, device: torch.device | str) -> "States":
        """The states on a device."""
        return States(*(tensor.to(device) for tensor in vars(self).values()))

    def __getitem__(self, rows: Tensor) -> "States":
        return States(*(tensor[rows] for tensor in vars(self).values()))

    def batches(self, batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """``(timestep, row indices)``, every batch inside one timestep, timesteps in order."""
        for timestep in self.timestep.unique().tolist():
            for rows in (self.timestep == timestep).nonzero().squeeze(-1).split(batch_size):
                yield timestep, rows


@dataclass(frozen=True)
class Calibration:
    """Calibration states of one model.

    Attributes:
        parts: states, one entry for each sequence length.
        timesteps: ``T`` of the schedule they were drawn on.
        source: ``forward`` or ``trajectory``.
    """

    parts: tuple[States, ...]
    timesteps: int
    source: Source

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("calibration: found no states, allowed is at least one")
        if self.source not in SOURCES:
            raise ValueError(f"calibration.source: found {self.source!r}, allowed are {', '.join(SOURCES)}")
        for part in self.parts:
            low, high = int(part.timestep.min()), int(part.timestep.max())
            if low < 0 or high >= self.timesteps:
                raise ValueError(f"calibration: timestep: found {low}..{high}, allowed are 0..{self.timesteps - 1}")
            for name in ("ids", "clean"):
                if (least := int(getattr(part, name).min())) < 0:
                    raise ValueError(f"calibration: {name}: found {least}, allowed are ids of tokens, 0 or above")

    def __len__(self) -> int:
        return sum(len(part.ids) for part in self.parts)

    def batches(self, batch_size: int = 64) -> Iterator[tuple[int, int, Tensor]]:
        """``(number of the part, timestep, row indices)``: the batches of every part in order."""
        for number, part in enumerate(self.parts):
            for timestep, rows in part.batches(batch_size):
                yield number, timestep, rows

    def to(self, device: torch.device | str) -> "Calibration":
        """The states on a device."""
        return Calibration(tuple(part.to(device) for part in self.parts), self.timesteps, self.source)

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError where the states are of a model with more tokens than so many."""
        for number, part in enumerate(self.parts):
            for name in ("ids", "clean"):
                if (most := int(getattr(part, name).max())) >= size:
                    found = f"found id {most} in part {number}"
                    raise ValueError(f"calibration: {name}: {found}, allowed are 0..{size - 1}, the model's")

    def thinned(self, count: int) -> "Calibration":
        """So many states of each part, spread evenly over it and so over its timesteps.

        Raises:
            ValueError: more states than the smallest part has, or none.
        """
        most = min(len(part.ids) for part in self.parts)
        if not 1 <= count <= most:
            raise ValueError(f"states: found {count}, allowed are 1..{most}")
        parts = (part[torch.arange(count) * len(part.ids) // count] for part in self.parts)
        return Calibration(tuple(parts), self.timesteps, self.source)

    def tensors(self) -> dict[str, Tensor]:
        """The states' tensors by number of the part and name, e.g. ``0.ids``."""
        return {f"{i}.{name}": tensor for i, part in enumerate(self.parts) for name, tensor in vars(part).items()}

    def save(self, path: str | Path) -> None:
        """Write the states as one safetensors file; an earlier file stays whole until the new one is."""
        tensors = {k: v.to(torch.int32) if v.dtype == torch.int64 else v for k, v in self.tensors().items()}
        # One entry: the order of several in the file is left to chance, and equal states should be equal files.
        about = json.dumps({"timesteps": self.timesteps, "source": self.source})
        with replacing(path) as new:
            save_file(tensors, new, metadata={"calibration": about})

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what ``save`` wrote.

        Raises:
            ValueError: no such file, or not a complete calibration file; names the field.
        """
        if not Path(path).is_file():
            raise ValueError(f"calibration: found no file {shown(path)}")
        damaged = f"{shown(path)}: not a complete calibration file"
        try:
            with safe_open(path, framework="pt") as file:
                about = parse_json((file.metadata() or {})["calibration"], damaged, is_line=True)
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"{damaged} ({error!s:.200})") from error
        timesteps, source = field_of(about, "timesteps", int, damaged), field_of(about, "source", str, damaged)
        numbers = range(len({key.partition(".")[0] for key in tensors}))
        expected = {f"{number}.{name}" for number in numbers for name in _FIELDS}
        for name in sorted(expected ^ tensors.keys()):
            found, allowed = ("none", "one") if name in expected else ("one", "none")
            raise ValueError(f"{damaged}: {brief(name)}: found {found}, allowed is {allowed}")
        tensors = {key: tensor.long() if tensor.dtype == torch.int32 else tensor for key, tensor in tensors.items()}
        try:
            parts = (States(**{name: tensors[f"{number}.{name}"] for name in _FIELDS}) for number in numbers)
            return cls(tuple(parts), timesteps, cast(Source, source))  # which checks it
        except ValueError as error:
            raise ValueError(f"{damaged}: {error}") from error


def forward_states(ids: Tensor, allowed: Tensor | None, timesteps: int, mask_token_id: int, seed: int) -> States:
    """Every sequence masked at every timestep's ratio by the forward process.

    Args:
        ids: int64 ``(sequences, length)``.
        allowed: bool, same shape: positions that may be masked; None for all.
        timesteps: ``T``.
        mask_token_id: id written at masked positions.
        seed: seeds the masks.

    Returns:
        ``sequences * timesteps`` states, timestep by timestep.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [
        mask_tokens(ids, ratio.expand(len(ids)), mask_token_id, generator, allowed)
        for ratio in mask_ratios(timesteps)[:-1]
    ]
    return States(
        torch.cat([masked for masked, _ in parts]),
        torch.cat([is_masked for _, is_masked in parts]),
        torch.arange(timesteps, device=ids.device).repeat_interleave(len(ids)),
        ids.repeat(timesteps, 1),
    )


def trajectory_states(
    lm: DiffusionLM,
    ids: Tensor,
    allowed: Tensor | None,
    timesteps: int,
    seed: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> States:
    """The states of the model's own ancestral trajectories (sampler ``origin``, temperature 1).

    Args:
        lm: the model that denoises.
        ids: int64 ``(sequences, length)``, kept where ``allowed`` is False (the prompt).
        allowed: bool, same shape: positions that are masked at the start; None for all.
        timesteps: ``T``.
        seed: seeds the trajectories.
        batch_size: sequences a forward pass.
        progress: label of a progress bar; None for none.

    Returns:
        ``sequences * timesteps`` states, timestep by timestep, on the device of ``ids``; state ``i`` is what step ``i``
        starts from.
    """
    start = torch.where(torch.ones_like(ids, dtype=torch.bool) if allowed is None else allowed, lm.mask_token_id, ids)
    seen: list[Tensor] = []
    final = generate(
        lm,
        start,
        timesteps=timesteps,
        sampler="origin",
        temperature=1.0,
        eps=0.0,
        block_length=0,  # the process in which all positions are masked alike, also of a block-causal model
        seed=seed,
        batch_size=batch_size,
        on_state=lambda timestep, rows, x: seen.append(x.clone()),
        progress=progress,
    )
    states = torch.cat(seen).to(ids.device)
    return States(
        states,
        states == lm.mask_token_id,
        torch.arange(timesteps, device=ids.device).repeat_interleave(len(ids)),
        final.repeat(timesteps, 1),
    )


def calibration_batches(
    lm: DiffusionLM,
    seed: int = 0,
    *,
    sequences: int = 32,
    puzzles: int = 16,
    length: int = corpus.SEQUENCE_LENGTH,
    task_length: int = TASK_LENGTH,
) -> list[tuple[Tensor, Tensor | None]]:
    """The project's calibration text: training code and, where the model knows them, training puzzles of each task.

    The code comes from a random choice of files, eight for each sequence, so that not all have to be tokenized.

    Args:
        lm: the model; only its tokenizer is used.
        seed: seeds the choice of files and sequences, and the puzzles.
        sequences, length: number of sequences of code, and of tokens of each.
        puzzles, task_length: number of puzzles of each task, and of tokens of each.

    Returns:
        ``(ids, allowed)`` pairs as ``calibrate`` takes them.
    """
    files = corpus.load_corpus("train")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[: 8 * sequences].tolist()
    names = list(files)
    chosen = {names[index]: files[names[index]] for index in order}
    code = held_out_sequences(chosen, lm.tokenizer, sequences, length, seed)
    if not knows_tasks(lm.tokenizer):
        return [(code, None)]
    made = [puzzle for task in TASKS for puzzle in make_puzzles(task, puzzles, seed, test=False)]
    return [(code, None), encode_puzzles(made, lm.tokenizer, task_length)]


def text_batches(
    lm: DiffusionLM, texts: Sequence[str], *, sequences: int = 128, length: int = 512, seed: int = 0
) -> list[tuple[Tensor, Tensor | None]]:
    """Calibration text of the user's own.

    Args:
        lm: the model; only its tokenizer and configuration are used.
        texts: see ``data.texts.read_texts``.
        sequences, length: number of sequences, and of tokens of each.
        seed: seeds the choice of sequences.

    Returns:
        ``(ids, allowed)`` pairs as ``calibrate`` takes them.

    Raises:
        ValueError: too little text.
    """
    return [(text_sequences(texts, lm.tokenizer, sequences, length, seed, lm.end_token_id), None)]


def calibrate(
    lm: DiffusionLM | MaskPredictor,
    batches: list[tuple[Tensor, Tensor | None]] | None = None,
    *,
    timesteps: int = 16,
    source: Source = "trajectory",
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Draw calibration states; of a block-causal model each is of one block after finished text, see ``diffusion.cut``.

    Args:
        lm: the full-precision model, also one of ``transformers``' Auto classes.
        batches: pairs ``(ids, allowed)``: int64 ``(sequences, length)`` and the positions to denoise (bool, or None
            for all); by default what ``calibration_batches`` makes of the project's training code and puzzles.
        timesteps: number of denoising steps ``T``.
        source: ``trajectory`` (the model's own denoising) or ``forward`` (text, masked at the schedule's ratios).
        seed: seeds text, masks and denoising.
        progress: show a bar.

    Raises:
        ValueError: empty calibration set, unknown source, or a value out of range.
    """
    if source not in SOURCES:
        raise ValueError(f"calibration.source: found {source!r}, allowed are {', '.join(SOURCES)}")
    lm = as_lm(lm)
    if batches is None:
        batches = calibration_batches(lm, seed)
    if not batches or any(not len(ids) for ids, _ in batches):
        raise ValueError("calibration: found an empty calibration set, allowed is at least one sequence")
    cut: dict[str, Any] = {"count": _BLOCKS, "own": source == "trajectory", "timesteps": timesteps, "seed": seed}
    parts = []
    for ids, allowed in (pair for some, where in batches for pair in cut_to_blocks(lm, some, where, **cut)):
        if source == "forward":
            parts.append(forward_states(ids, allowed, timesteps, lm.mask_token_id, seed))
        else:
            label = "calibration" if progress else None
            parts.append(trajectory_states(lm, ids, allowed, timesteps, seed, progress=label))
    return Calibration(tuple(parts), timesteps, source)
