"""Models that ``transformers`` has loaded, as this library's functions take them."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from thermo_lib.models.architectures import MODELS, MaskPredictor, skeleton
from thermo_lib.models.families import read_config
from thermo_lib.models.lm import DiffusionLM, fill, model_folder
from thermo_lib.models.tokenization import (
    ChatTemplate,
    has_tokenizer,
    read_carried,
    read_chat_template,
    read_tokenizer,
)


def as_lm(model: DiffusionLM | MaskPredictor | PreTrainedModel) -> DiffusionLM:
    """A model that ``transformers`` has loaded, as this library's functions take it.

    Args:
        model: of ``AutoModel.from_pretrained``, full precision or quantized, or one of ``transformers``' own masked
            language models (``AutoModelForMaskedLM``) of a family here; a ``DiffusionLM`` is returned as it is.

    Returns:
        The model, not a copy of it, with the tokenizer and the chat template of the folder that it was loaded from;
        both are None where that has no tokenizer. A ``QuantizedLM`` of a quantized model. Of one of ``transformers``'
        own the same weights in this library's model of that family.

    Raises:
        ValueError: a model of another kind, or a damaged tokenizer.
    """
    if isinstance(model, PreTrainedModel) and not isinstance(model, MaskPredictor):
        return _of_transformers(model)
    if isinstance(model, nn.Module) and not isinstance(model, MaskPredictor):
        raise ValueError(f"model: found {type(model).__name__}, allowed is what load_model or AutoModel returns")
    if not isinstance(model, MaskPredictor):
        return model
    found = getattr(getattr(model, "hf_quantizer", None), "lm", None)
    about = model.config.mask_token_id, model.config.name_or_path
    lm = found or DiffusionLM(model, None, *about)  # type: ignore[arg-type]  # None nowhere else; no text is read then
    return lm if model.folder is None else _with_files(lm, model.folder)


def _of_transformers(model: PreTrainedModel) -> DiffusionLM:
    """The weights of one of ``transformers``' own models in this library's, which has them in common with it.

    Raises:
        ValueError: a model that wasn't loaded, of no family here or without its head, or what ``read_config`` raises,
            as of a model whose files don't say that it is a diffusion model.
    """
    name, kind = model.config.name_or_path, type(model).__name__
    instead = "allowed is what load_model or AutoModel returns"
    if not name:
        raise ValueError(f"model: found {kind} that wasn't loaded from a folder or a hub id, {instead}")
    folder = model_folder(name)
    config = read_config(folder)
    wanted = MODELS[config.model_type].__bases__[1]  # of transformers, beside MaskPredictor
    if not isinstance(model, wanted):
        raise ValueError(f"model: found {kind}, allowed is {wanted.__name__}, which has a head")
    built, weights = skeleton(config), model.state_dict()
    fill(built, {key: weights[key] for key in built.state_dict()}, model.dtype)
    built.to(model.device)
    return _with_files(DiffusionLM(built, None, config.mask_token_id, name), folder)  # type: ignore[arg-type]


def _with_files(lm: DiffusionLM, folder: Path) -> DiffusionLM:
    """A model with the tokenizer, the chat template and the carried settings of a folder, if that has a tokenizer."""
    if not has_tokenizer(folder):
        return lm
    written = tuple(path.stat().st_mtime_ns for path in sorted(folder.glob("*.*")) if path.suffix != ".safetensors")
    tokenizer, chat_template, carried = _beside(folder, lm.model.config.vocab_size, written)
    return replace(lm, tokenizer=tokenizer, chat_template=chat_template, carried=carried)


@lru_cache(maxsize=4)  # a tokenizer takes up to a second to read, and every generation asks
def _beside(folder: Path, vocab_size: int, written: tuple[int, ...]) -> tuple[Tokenizer, ChatTemplate | None, Any]:
    """Tokenizer, chat template and carried settings of a folder whose files were written at these times."""
    return read_tokenizer(folder, vocab_size), read_chat_template(folder), read_carried(folder)
