"""Diffusion language models in plain ``transformers`` modules, loaded without running checkpoint code.

Dream (arXiv 2508.15487) is a Qwen2 transformer with bidirectional attention that fills mask tokens;
its logits are shifted by one: the state at position ``i - 1`` predicts token ``i``, as in the
autoregressive model it was initialized from.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

REFERENCE_DIR = Path(__file__).resolve().parent / "reference"
MODEL_TYPES = ("Dream",)
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
NO_PROBABILITY = -1e30  # finite, so that 0 * log 0 is 0 in a KL divergence


class DreamConfig(Qwen2Config):
    """Qwen2's configuration with the mask token of Dream's ``config.json``."""

    model_type = "Dream"
    mask_token_id: int | None = None


class DreamModel(Qwen2ForCausalLM):
    """Dream's architecture: Qwen2 blocks, bidirectional attention, logits shifted by one."""

    config_class = DreamConfig

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The last hidden states, shifted so that position ``i`` predicts token ``i``.

        Args:
            input_ids: int64 ``(batch, length)``.
            attention_mask: bool ``(batch, length)``, False at padding; None when there is none.

        Returns:
            ``(batch, length, hidden)``; ``lm_head`` turns it into logits.
        """
        is_masked = input_ids == self.config.mask_token_id
        for module in self.modules():
            if hasattr(module, "set_token_state"):
                module.set_token_state(is_masked)
        position_ids = None
        bias = None
        if attention_mask is not None:
            dtype = self.lm_head.weight.dtype
            hidden_keys = ~attention_mask.bool()[:, None, None, :].expand(-1, 1, input_ids.shape[1], -1)
            bias = torch.zeros(hidden_keys.shape, dtype=dtype, device=input_ids.device)
            bias = bias.masked_fill(hidden_keys, torch.finfo(dtype).min)
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        states = self.model(
            input_ids=input_ids,
            attention_mask={"full_attention": bias},
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        shifted = torch.cat([states[:, :1], states[:, :-1]], dim=1)
        if attention_mask is None:
            return shifted
        # A first token has no state before it and keeps its own, with or without padding on its left.
        after_padding = ~torch.nn.functional.pad(attention_mask.bool()[:, :-1], (1, 0))
        return torch.where(after_padding[..., None], states, shifted)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(batch, length, vocabulary)`` of the token at each position."""
        return self.lm_head(self.hidden(input_ids, attention_mask))


@dataclass
class DiffusionLM:
    """A diffusion language model with its tokenizer.

    Attributes:
        model: a ``DreamModel``, its linear layers perhaps quantized.
        tokenizer: text to token ids.
        mask_token_id: the id that stands for a masked position.
        name: where it was loaded from.
    """

    model: DreamModel
    tokenizer: Tokenizer
    mask_token_id: int
    name: str

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
    def logits(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits at chosen positions only, which saves work in the head; the mask token gets no probability.

        A filled position is never a mask token (the zero masking probabilities of MDLM, arXiv 2406.07524).

        Args:
            ids: int64 ``(batch, length)``.
            at: bool ``(batch, length)``, True at ``n`` positions.

        Returns:
            ``(n, vocabulary)`` in row-major order of ``at``.
        """
        logits = self.model.lm_head(self.model.hidden(ids)[at])
        logits[:, self.mask_token_id] = NO_PROBABILITY
        return logits


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


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "mask_token_id",
)
_OPTIONAL = ("max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: not JSON, or something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: found invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected an object")
    return content


def read_config(folder: Path) -> DreamConfig:
    """The configuration in ``folder/config.json``; keys that ask for remote code are not obeyed.

    Raises:
        ValueError: no such file, not JSON, unsupported ``model_type``, or a missing field.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model: found no config.json in {folder}")
    content = read_object(path)
    model_type = content.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{path}: model_type: found {model_type!r}, supported are {', '.join(MODEL_TYPES)}")
    missing = [key for key in _REQUIRED if content.get(key) is None]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    wrong = [key for key in _REQUIRED if type(content[key]) is not int or content[key] < 0]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]}: found {content[wrong[0]]!r}, allowed are whole numbers from 0")
    return DreamConfig(**{key: content[key] for key in (*_REQUIRED, *_OPTIONAL) if key in content})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file, or of the shards that its index names.

    Raises:
        ValueError: no weights, pickled weights only, a shard outside the folder, or an unreadable file.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: weight_map: found {type(weight_map).__name__}, expected an object")
        names = sorted(set(weight_map.values()))
    else:
        names = [WEIGHTS_NAME]
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name:
            raise ValueError(f"{index}: found shard {name!r} outside the folder, allowed are files in {folder}")
        if not path.is_file():
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle, convert it to safetensors first" if pickled else ""
            raise ValueError(f"model: found no {name} in {folder}{hint}")
        tensors |= read_safetensors(path)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        ValueError: no such file, or not a complete one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    """Compare names, shapes and finiteness of the tensors in a checkpoint with what the model needs.

    Raises:
        ValueError: a tensor is missing, extra, of the wrong shape, or holds NaN or infinity.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise ValueError(f"{where}: missing tensors {', '.join(missing[:5])} ({len(missing)} in all)")
    if extra:
        raise ValueError(f"{where}: unexpected tensors {', '.join(extra[:5])} ({len(extra)} in all)")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            shapes = f"found shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            raise ValueError(f"{where}: tensor {name}: {shapes}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: tensor {name}: found NaN or infinity, expected finite numbers")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The ``tokenizers`` file of a model folder."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"model: found no tokenizer.json in {folder}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower type
        raise ValueError(f"{path}: not a tokenizer file ({error})") from error


def model_folder(name: str) -> Path:
    """The folder of a model: the embedded reference, a local folder, or a hub id (downloaded, no code).

    Raises:
        ValueError: neither a folder nor a hub id that can be downloaded.
    """
    if name == "reference":
        return REFERENCE_DIR
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        allowed = "'reference', a folder with config.json and safetensors, or a reachable hub id"
        raise ValueError(f"model: found {name!r}, allowed are {allowed} ({type(error).__name__})") from error


def load_model(name: str = "reference") -> DiffusionLM:
    """Load a full-precision diffusion language model in float32, in evaluation mode.

    Args:
        name: ``"reference"`` for the embedded model, a local folder, or a hub id.

    Raises:
        ValueError: unknown model, unsupported type, or damaged weights; the message says which and why.
    """
    folder = model_folder(name)
    config = read_config(folder)
    model = DreamModel(config)
    tensors = read_tensors(folder)
    expected = model.state_dict()
    if config.tie_word_embeddings and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight", torch.empty(0))
    check_tensors(tensors, expected, folder)
    model.load_state_dict(tensors)
    return DiffusionLM(model.eval().requires_grad_(False), read_tokenizer(folder), config.mask_token_id, name)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder beside ``folder``, then put it in its place: complete or not there at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        write(temporary)
        if folder.exists():
            retired = temporary.with_name(f"{temporary.name}.old")
            os.replace(folder, retired)
            os.replace(temporary, folder)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def config_json(config: DreamConfig, **more: Any) -> str:
    """``config.json`` in the layout of the published Dream checkpoints."""
    content = {
        "architectures": ["DreamModel"],
        "model_type": config.model_type,
        **{key: getattr(config, key) for key in _REQUIRED},
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": config.hidden_act,
        **more,
    }
    return json.dumps(content, indent=2) + "\n"


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
        state = {name: tensor.to(dtype).contiguous() for name, tensor in lm.model.state_dict().items()}
        if lm.model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, target / WEIGHTS_NAME, metadata={"format": "pt"})
        (target / WEIGHTS_NAME).chmod(0o644)
        (target / "config.json").write_text(config_json(lm.model.config, torch_dtype=str(dtype).split(".")[1]))
        lm.tokenizer.save(str(target / "tokenizer.json"))
        for name, text in (extra or {}).items():
            (target / name).write_text(text, encoding="utf-8")

    write_folder(Path(folder), write)
