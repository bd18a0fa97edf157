"""Diffusion language models, loaded from published checkpoints without running checkpoint code, and saved.

Read are the layouts of Dream (arXiv 2508.15487) and LLaDA (arXiv 2502.09992), from safetensors only.
"""

import ctypes
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from thermo_lib.architectures import (
    DreamConfig,
    DreamModel,
    MaskPredictor,
    config_json,
    read_config,
    read_object,
    skeleton,
    tensor_name,
)
from thermo_lib.snapshots import writing
from thermo_lib.tokenization import ChatTemplate, read_chat_template, read_tokenizer, save_tokenizer

REFERENCE_DIR = Path(__file__).resolve().parent / "reference"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
HEAD = "lm_head.weight"
NO_PROBABILITY = -1e30  # finite, so that 0 * log 0 is 0 in a KL divergence
FULL_PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PICKLES = ("*.bin", "*.pt", "*.pth")
CONVERT = (
    "pickled weights are never read; on a machine where you trust them: "
    f"safetensors.torch.save_file(torch.load(FILE, weights_only=True), '{WEIGHTS_NAME}', metadata={{'format': 'pt'}})"
)


@dataclass
class DiffusionLM:
    """A diffusion language model with its tokenizer.

    Attributes:
        model: a ``DreamModel`` or ``LLaDAModel``, its linear layers perhaps quantized.
        tokenizer: text to token ids.
        mask_token_id: the id that stands for a masked position.
        name: where it was loaded from.
        chat_template: how to write a conversation; None for a model that wasn't tuned on any.
    """

    model: MaskPredictor
    tokenizer: Tokenizer
    mask_token_id: int
    name: str
    chat_template: ChatTemplate | None = field(default=None, kw_only=True)

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the model's text, ready for ``tokenizer.encode(text, add_special_tokens=False)``.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: end with the opening of an answer.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            expected = "expected a model with chat_template.jinja, or chat_template in tokenizer_config.json"
            raise ValueError(f"chat: found no chat template in {self.name!r}, {expected}")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def decode(self, ids: Tensor) -> str:
        """Text of token ids ``(length,)``, up to the first special token."""
        special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return self.tokenizer.decode(list(itertools.takewhile(lambda token: token not in special, ids.tolist())))

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        """Tell every time-aware layer which denoising step comes next.

        Args:
            timestep: ``i`` in ``0..timesteps-1``.
            timesteps: ``T`` of the run; layers calibrated with another T take the step at the same mask ratio.
        """
        for module in self.model.modules():
            if hasattr(module, "set_timestep"):
                module.set_timestep(timestep, timesteps)

    @torch.no_grad()
    def logits(self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits at chosen positions only, which saves work in the head; the mask token gets no probability.

        A filled position is never a mask token (the zero masking probabilities of MDLM, arXiv 2406.07524).

        Args:
            ids: int64 ``(batch, length)``.
            at: bool ``(batch, length)``, True at ``n`` positions.
            attention_mask: bool ``(batch, length)``, False at padding on the left; None where there is none.

        Returns:
            ``(n, vocabulary)`` in row-major order of ``at``, on the device of ``ids``, which may be another than the
            model's.

        Raises:
            ValueError: ids outside the vocabulary.
        """
        device, vocab_size = self.model.device, self.model.config.vocab_size
        is_unknown = (ids < 0) | (ids >= vocab_size)
        if is_unknown.any():
            raise ValueError(f"ids: found {ids[is_unknown][0].item()}, allowed are 0..{vocab_size - 1}")
        visible = None if attention_mask is None else attention_mask.to(device)
        logits = self.model.lm_head(self.model.hidden(ids.to(device), visible)[at.to(device)])
        logits[:, self.mask_token_id] = NO_PROBABILITY
        return logits.to(ids.device)


def build_reference(vocab_size: int, mask_token_id: int, sizes: dict[str, int], seed: int) -> DreamModel:
    """A randomly initialized reference model; equal seeds give equal weights."""
    torch.manual_seed(seed)
    config = DreamConfig(
        vocab_size=vocab_size,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["num_hidden_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_attention_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        mask_token_id=mask_token_id,
        bos_token_id=None,
        attention_dropout=0.0,
    )
    return DreamModel(config)


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors file or else, as in ``transformers``, the shards that its index names.

    Raises:
        ValueError: no weights, pickled weights only, a damaged index, or shards that hold something else than it says.
    """
    whole, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _shards(index)
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    hint = f"{pickled[0]} is a pickle, convert it: " if pickled else ""  # of a hub id, pickles aren't downloaded
    raise ValueError(f"model: found no {WEIGHTS_NAME} in {folder}; {hint}{CONVERT}")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, no tensor in another or in more than it says."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = "an empty object" if weight_map == {} else type(weight_map).__name__
        raise ValueError(f"{index}: weight_map: found {found}, expected an object from tensors to files")
    for tensor, name in weight_map.items():
        allowed = f"allowed are files in {index.parent} that end in .safetensors"
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map: {tensor}: found {name!r}, {allowed}")
        if Path(name).name != name:
            raise ValueError(f"{index}: weight_map: {tensor}: found shard {name!r} outside the folder, {allowed}")
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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder; raises what ``weight_files`` and ``read_safetensors`` raise."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_safetensors(path).items()}


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """A file to read single tensors from.

    Raises:
        ValueError: no such file, or not a complete one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


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


def check_finite(tensor: Tensor, name: str, where: Path) -> None:
    """Raise ValueError if a tensor of a checkpoint holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    numbers = tensor if tensor.dtype in FULL_PRECISION else tensor.float()  # 8-bit floats have no isfinite
    if not numbers.isfinite().all():
        raise ValueError(f"{where}: tensor {name}: found NaN or infinity, expected finite numbers")


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


def take_expected(
    found: Mapping[str, Tensor], config: PreTrainedConfig, expected: Mapping[str, Tensor], where: Path
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the library's names: all that the model needs and no other.

    Args:
        found: the tensors by the names of ``config``'s architecture.
        config: the model's configuration.
        expected: the library's name to a tensor of the right shape; the head may be missing where it is tied.
        where: the checkpoint.

    Raises:
        ValueError: what ``check_tensors`` raises, in the names of the checkpoint.
    """
    names = stored_names(found, config, expected)
    check_tensors(found, {stored: expected[name] for stored, name in names.items()}, where)
    return {name: found[stored] for stored, name in names.items()}


def stored_names(found: Container[str], config: PreTrainedConfig, expected: Iterable[str]) -> dict[str, str]:
    """What a checkpoint calls the tensors that a model needs, to the library's names; without a tied head."""
    names = {tensor_name(config, name): name for name in expected}
    head = tensor_name(config, HEAD)
    if config.tie_word_embeddings and head not in found:
        names.pop(head, None)
    return names


def fill(model: MaskPredictor, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give a model that was built on the meta device its tensors, and make it ready to evaluate.

    Args:
        model: its parameters hold no memory yet.
        tensors: the library's name to tensor; emptied, so that no tensor is held twice.
        dtype: of the model's parameters.
    """
    for name in list(tensors):
        model.load_state_dict({name: tensors.pop(name).to(dtype)}, strict=False, assign=True)
    if isinstance(model.lm_head, nn.Linear):
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)  # its numbers are in no checkpoint
    model.eval().requires_grad_(False)


def model_folder(name: str) -> Path:
    """The folder of a model: the embedded reference, a local folder, or a hub id (downloaded, no code).

    Raises:
        ValueError: neither a folder nor a hub id that can be downloaded.
    """
    if name == "reference":
        return REFERENCE_DIR
    if name and Path(name).is_dir():  # Path("") is the working directory
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        allowed = "'reference', a folder with config.json and safetensors, or a reachable hub id"
        raise ValueError(f"model: found {name!r}, allowed are {allowed} ({type(error).__name__})") from error


def load_model(name: str = "reference", *, dtype: torch.dtype = torch.float32) -> DiffusionLM:
    """Load a full-precision diffusion language model, in evaluation mode.

    Args:
        name: ``"reference"`` for the embedded model, a local folder, or a hub id.
        dtype: of the weights in memory.

    Raises:
        ValueError: unknown model, a quantized one, unsupported type, or damaged weights; the message says which and
            why.
    """
    folder = model_folder(name)
    config = read_config(folder)
    check_unquantized(folder)
    tokenizer, chat_template = read_tokenizer(folder, config.vocab_size), read_chat_template(folder)
    model = skeleton(config)
    found = read_tensors(folder)
    for key, tensor in found.items():
        check_full_precision(tensor.dtype, key, folder)
    tensors = take_expected(found, config, model.state_dict(), folder)
    for key in tensors:
        tensors[key] = tensors[key].to(dtype)
        check_finite(tensors[key], f"{tensor_name(config, key)} as {dtype}", folder)
    fill(model, tensors, dtype)
    return DiffusionLM(model, tokenizer, config.mask_token_id, name, chat_template=chat_template)


def check_unquantized(folder: Path) -> None:
    """Raise ValueError if a folder's ``config.json`` says that its weights are quantized."""
    path = folder / "config.json"
    found = read_object(path).get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method == "thermo":
        raise ValueError(f"model: found a quantized model in {folder}, load it with load_quantized")
    raise ValueError(f"{path}: quantization_config: found quant_method {method!r}, allowed is a model without")


def output_folder(folder: str | Path, source: Path | None = None) -> Path:
    """Where a model folder may be written, as an absolute path without links.

    Args:
        folder: as it was named; through a link, what it leads to.
        source: the model folder that is read meanwhile.

    Raises:
        ValueError: writing there would take away the working directory, the source, or what isn't a model.
    """
    path, held = Path(os.path.realpath(folder)), [] if source is None else [source, *source.iterdir()]
    if Path.cwd().is_relative_to(path):
        found = "the working directory or a folder that holds it"
    elif any(Path(os.path.realpath(each)).is_relative_to(path) for each in held):
        found = "the source or a folder that holds it"
    elif os.path.lexists(path) and not path.is_dir():
        found = "something else than a folder"
    elif path.is_dir() and not _is_replaceable(path):
        found = "a folder with something else than a model in it"
    else:
        return path
    allowed = "a new folder, an empty one, or one with config.json and no folder in it, which is replaced"
    raise ValueError(f"output: found {str(folder)!r}, {found}; allowed is {allowed}")


def _is_replaceable(folder: Path) -> bool:
    inside = list(folder.iterdir())
    return not inside or ((folder / "config.json").is_file() and not any(path.is_dir() for path in inside))


@contextmanager
def only_writer(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only one that writes a folder; an earlier one that a killed writer left aside is put back first.

    The lock is on a file beside the folder and ends with the process, however that ends.

    Args:
        folder: of ``output_folder``.
        wait: for another writer.

    Raises:
        ValueError: there is another writer and ``wait`` is False.
        OSError: no right to write beside the folder.
    """
    path, retired = folder.with_name(f".{folder.name}.lock"), _retired(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path, wait)
    if lock is None:
        found = f"found another run writing {folder}"
        raise ValueError(f"output: {found}, allowed is one at a time; wait for it or name another folder")
    try:
        with writing(folder):
            if os.path.lexists(folder):
                remove(retired)
            elif retired.is_dir():
                os.replace(retired, folder)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, see _lock
        os.close(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """The descriptor of a locked file; None if another writer holds the lock and isn't to be waited for."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.stat(path), os.fstat(lock)):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        os.close(lock)  # of a file that the writer before has removed; whoever comes now locks a new one


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder beside ``folder``, then put it in its place: complete or not there at all.

    Another writer of the same folder is waited for.

    Args:
        folder: to write.
        write: fills the folder that it is given.

    Raises:
        ValueError: what ``output_folder`` raises.
        OSError: no space left, or no right to write.
    """
    folder = output_folder(folder)
    temporary = folder.with_name(f".{folder.name}.writing")
    with only_writer(folder, wait=True), writing(folder, "an earlier folder is as it was"):
        remove(temporary)  # of a writer that was killed
        try:
            temporary.mkdir()
            temporary.chmod(0o755)
            write(temporary)
            replace_folder(folder, temporary)
        finally:
            remove(temporary)


def replace_folder(folder: Path, complete: Path) -> None:
    """Put a complete folder in the place of another, which may not exist, beside it.

    Where the system can swap names, one of both is there at every moment; elsewhere ``only_writer`` puts the earlier
    one back if this is killed between its two steps.
    """
    retired = _retired(folder)
    if folder.is_dir() and _exchange(folder, complete):
        remove(complete)  # which is now the earlier one
    else:
        if folder.is_dir():
            remove(retired)
            os.replace(folder, retired)
        os.replace(complete, folder)
    remove(retired)


def _retired(folder: Path) -> Path:
    """Where a folder is while another takes its place, if the system can't swap names."""
    return folder.with_name(f".{folder.name}.partial.old")


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False where the system or the file system can't."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def remove(path: Path) -> None:
    """Remove a folder with all in it as far as that is allowed, or whatever else is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_model(
    lm: DiffusionLM,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a full-precision model as ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    An earlier folder of that name stays as it was until the new one is complete.

    Args:
        lm: the model.
        folder: where to write it.
        dtype: of the stored weights.
        extra: more text files, name to content.
    """

    def write(target: Path) -> None:
        config = lm.model.config
        state = {name: tensor.to(dtype).contiguous() for name, tensor in lm.model.state_dict().items()}
        if config.tie_word_embeddings:
            del state[HEAD]
        state = {tensor_name(config, name): tensor for name, tensor in state.items()}
        save_file(state, target / WEIGHTS_NAME, metadata={"format": "pt"})
        (target / WEIGHTS_NAME).chmod(0o644)
        (target / "config.json").write_text(config_json(config, torch_dtype=str(dtype).split(".")[1]))
        save_tokenizer(lm.tokenizer, lm.chat_template, target)
        for name, text in (extra or {}).items():
            (target / name).write_text(text, encoding="utf-8")

    write_folder(Path(folder), write)
