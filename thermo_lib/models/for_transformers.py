"""What ``transformers`` reads of a model folder beside ``config.json``, checked before it fails at it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from thermo_lib.files.reading import read_object
from thermo_lib.files.tensors import CONVERT, check_dtype, check_for_transformers
from thermo_lib.models.tokenization import GENERATION_NAME

_DISTRIBUTED = "shard-*-model-*-of-*.safetensors"  # parts of tensors, which transformers prefers to whole ones


def check_request(name: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a call of ``from_pretrained`` whose files ``transformers`` would take without a word, or fail at.

    Args:
        name: of the model; where it is no folder only the arguments are checked.
        arguments: others of the call.

    Raises:
        ValueError: an argument, or a file of the folder; names it.
    """
    if arguments.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors: found False, allowed is True; {CONVERT}")
    variant = arguments.get("variant")
    if not (variant is None or isinstance(variant, str)):
        raise ValueError(f"variant: found {variant!r:.80}, allowed are None and a word in the names of files")
    for key in ("dtype", "torch_dtype"):
        if isinstance(dtype := arguments.get(key), torch.dtype):
            check_dtype(dtype)
    folder = None if name is None else Path(name, arguments.get("subfolder") or "")
    if folder is None or not folder.is_dir():
        return
    check_for_transformers(folder, variant)
    if found := sorted(path.name for path in folder.glob(_DISTRIBUTED)):
        raise ValueError(f"model: found {found[0]} in {name}, allowed are files that hold whole tensors")
    if (path := folder / GENERATION_NAME).is_file():
        _check_generation(path)


def _check_generation(path: Path) -> None:
    """Raise ValueError for settings of generation that ``transformers`` refuses, which needn't say which one."""
    content = read_object(path, any_number=False)
    if (reason := _refusal(content)) is None:
        return
    for key, value in content.items():
        if (alone := _refusal({key: value})) is not None:
            raise ValueError(f"{path}: {key}: found {value!r:.80}, which transformers refuses ({alone:.200})")
    raise ValueError(f"{path}: found settings that transformers refuses ({reason:.200})")


def _refusal(content: dict[str, Any]) -> str | None:
    """Why ``transformers`` refuses settings of generation, on one line; None where it takes them."""
    try:
        GenerationConfig.from_dict(content)
    except Exception as error:  # of any class: what is of a wrong type is compared with numbers, hashed, ...
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None
