"""A full-precision model in little memory: its blocks are read when they run, and dropped again if memory is short.

Last norm and head are on the device all the time, embeddings that the head doesn't share in the host's memory. Where
gradients are needed a block runs again on the way back (activation checkpointing, arXiv 1604.06174), so that no more
than one block's weights and activations are held.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thermo_lib.files.tensors import (
    check_finite,
    check_full_precision,
    check_shapes,
    open_safetensors,
    type_of,
    weight_files,
)
from thermo_lib.models.architectures import MaskPredictor, check_tied, skeleton
from thermo_lib.models.families import read_config, stored_names, used
from thermo_lib.models.lm import DiffusionLM, check_unquantized, fill, model_folder
from thermo_lib.models.tokenization import read_carried, read_chat_template, read_tokenizer, tokenizer_files
from thermo_lib.quant.calls import CALL, denoising

_ROOM = 24 * 2**30  # bytes of free memory; a GPU that has no more in all needs them for the states


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        key: its name there.
        path: the file.
        shape: of the tensor.
        itemsize: bytes of a number.
    """

    key: str
    path: Path
    shape: tuple[int, ...]
    itemsize: int


class Checkpoint:
    """The tensors of a full-precision checkpoint, read one at a time.

    Args:
        folder: of the checkpoint.
        model: of its configuration; needs no weights.

    Attributes:
        family: of the model.
        block_length: of the model, see ``MaskPredictor``.
        tensors: the library's name to where the tensor is; a copy of tied embeddings as the head is left out.

    Raises:
        ValueError: what ``weight_files``, ``stored_names`` and ``check_shapes`` raise.
    """

    def __init__(self, folder: Path, model: MaskPredictor):
        expected, found = model.state_dict(), {}
        for path in weight_files(folder):
            with open_safetensors(path) as file:
                for key in sorted(file.keys()):
                    part = file.get_slice(key)
                    found[key] = StoredTensor(key, path, tuple(part.get_shape()), type_of(part, key, path).itemsize)
        found = used(found, model.config)
        names = stored_names(found, model.config, expected)
        shapes = {key: stored.shape for key, stored in found.items()}
        check_shapes(shapes, {key: expected[name] for key, name in names.items()}, folder)
        check_tied(found, model.config, lambda key: _read(found[key]), folder)
        tied = model.parts.tied if model.config.tie_word_embeddings else {}
        self.folder = folder
        self.family, self.block_length = model.config.model_type, model.block_length
        self.tensors = {names[key]: stored for key, stored in found.items() if names[key] not in tied}
        self._seen: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A tensor by the library's name, of the type in which it is stored.

        Raises:
            ValueError: not a complete file, a type that full precision doesn't have, NaN or infinity.
        """
        stored = self.tensors[name]
        tensor = _read(stored).to(device)
        if name not in self._seen:
            check_full_precision(tensor.dtype, stored.key, stored.path)
            check_finite(tensor, stored.key, stored.path)
            self._seen.add(name)
        return tensor

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from others.

        Weights are known by their file's size, time and header: other numbers under the same size and time aren't
        noticed, and the same file with another time is taken for another.
        """
        found: dict[str, Any] = {"family": self.family}
        if self.block_length is not None:
            found["block_length"] = self.block_length
        for name in ("config.json", *tokenizer_files(self.folder)):
            with (self.folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        for path in weight_files(self.folder):
            about = path.stat()
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                file.seek(0)
                start = hashlib.sha256(file.read(min(8 + length, about.st_size))).hexdigest()
            found[path.name] = [about.st_size, about.st_mtime_ns, start]
        return found


def _read(stored: StoredTensor) -> Tensor:
    with open_safetensors(stored.path) as file:
        return file.get_tensor(stored.key)


class StreamedForward:
    """Stands for a block's ``forward``: reads its weights before it runs, and drops them after it.

    Args:
        block: the block, on the meta device.
        name: of the block.
        checkpoint: where its weights are.
        device: where it runs.
        dtype: of its weights in memory.

    Attributes:
        is_held: whether the weights stay for the time being.
        is_kept: whether the weights belong to the model from now on, whatever becomes of them.
    """

    def __init__(self, block: nn.Module, name: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.block, self.name, self.checkpoint, self.device, self.dtype = block, name, checkpoint, device, dtype
        self.is_held = self.is_kept = False

    def __call__(self, hidden_states: Tensor, **arguments: Any) -> Any:
        """The block on ``hidden_states (batch, length, hidden)``; where it isn't held, it runs again for gradients."""
        if self.is_held:
            return type(self.block).forward(self.block, hidden_states, **arguments)
        call = CALL.step, CALL.is_masked, CALL.rows

        def run(x: Tensor) -> Any:
            self.fill()
            try:
                with denoising(*call):
                    return type(self.block).forward(self.block, x, **arguments)
            finally:
                self.empty()

        if not torch.is_grad_enabled():
            return run(hidden_states)
        return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn

    def fill(self) -> None:
        """Read the weights, unless they are there."""
        if self.is_kept:
            return
        for name, parameter in self.block.state_dict().items():
            if parameter.is_meta:
                tensor = self.checkpoint.read(f"{self.name}.{name}", self.device).to(self.dtype)
                self.block.load_state_dict({name: tensor}, strict=False, assign=True)
        self.block.requires_grad_(False)

    def empty(self) -> None:
        """Drop the weights, unless they are held or kept, or a GPU has room for them."""
        if not (self.is_held or self.is_kept or self._has_room()):
            self.block.to("meta")

    def _has_room(self) -> bool:
        """Whether so much of a GPU's memory is free that the weights needn't be read again at the next pass."""
        return self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] > _ROOM


class HostEmbedding(nn.Embedding):
    """Embeddings in the host's memory: what is looked up is moved to the device.

    A step looks up some rows of many, and training them takes four times their memory.

    Args:
        weight: float ``(vocabulary, hidden)``, on the CPU.
        device: where the model is.
    """

    def __init__(self, weight: Tensor, device: torch.device):
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight)
        self.weight.requires_grad_(False)
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids, any shape, to embeddings ``(..., hidden)`` on the device."""
        some, place = ids.unique(return_inverse=True)  # of a masked text, few: less to move than every position's
        return F.embedding(place, super().forward(some.to(self.weight.device)).to(self.device))


def hold(block: nn.Module) -> None:
    """Let a streamed block's weights stay until ``release``; other blocks have theirs anyway."""
    if isinstance(streamed := vars(block).get("forward"), StreamedForward) and not streamed.is_held:
        streamed.fill()
        streamed.is_held = True


def release(block: nn.Module) -> None:
    """End what ``hold`` began."""
    if isinstance(streamed := vars(block).get("forward"), StreamedForward):
        streamed.is_held = False
        streamed.empty()


@contextmanager
def held(block: nn.Module) -> Iterator[None]:
    """While it is entered (``with``), a block's weights are there, and of a streamed block afterwards dropped."""
    hold(block)
    try:
        yield
    finally:
        release(block)


def keep(block: nn.Module) -> None:
    """Let a streamed block's weights belong to the model from now on, so that they can be changed."""
    if isinstance(streamed := vars(block).get("forward"), StreamedForward):
        streamed.fill()
        streamed.is_kept = True


@dataclass
class StreamedLM(DiffusionLM):
    """A diffusion language model whose blocks are read when they run.

    Attributes:
        checkpoint: where from.
    """

    checkpoint: Checkpoint

    def identity(self) -> dict[str, Any]:
        """See ``DiffusionLM``."""
        return self.checkpoint.identity()


def load_streamed(
    name: str,
    *,
    family: str | None = None,
    block_length: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StreamedLM:
    """Load a full-precision model whose blocks stay in its checkpoint; it computes what ``load_model``'s does.

    Args:
        name: ``"reference"`` for the embedded model, a local folder, or a hub id.
        family, block_length: see ``load_model``.
        device: where it runs; the model can't be moved.
        dtype: of the weights in memory.

    Raises:
        ValueError: what ``load_model`` raises; of a block's weights when it is first read.
    """
    folder, device = model_folder(name), torch.device(device)
    config = read_config(folder, family, block_length)
    check_unquantized(folder)
    tokenizer, chat_template = read_tokenizer(folder, config.vocab_size), read_chat_template(folder)
    model = skeleton(config)
    source = Checkpoint(folder, model)
    parts = model.parts
    resident = [name for name in source.tensors if not name.startswith(f"{parts.blocks}.")]
    on_host = () if config.tie_word_embeddings else (f"{parts.embeddings}.weight",)
    fill(model, {n: source.read(n, "cpu" if n in on_host else device) for n in resident}, dtype)
    if on_host and device.type != "cpu":
        weight = model.get_parameter(f"{parts.embeddings}.weight")
        model.set_submodule(parts.embeddings, HostEmbedding(weight, device))
    if model.rotary is not None:
        model.rotary.to(device)
    for number, block in enumerate(model.blocks):
        block.forward = StreamedForward(block, f"{parts.blocks}.{number}", source, device, dtype)
    carried = read_carried(folder)
    about = tokenizer, config.mask_token_id, name
    return StreamedLM(model, *about, source, chat_template=chat_template, carried=carried)
