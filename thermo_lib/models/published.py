"""The configurations of the published families, which ``transformers`` reads and writes in the published layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from thermo_lib.files.reading import read_object
from thermo_lib.models.settings import ConfigBase, in_one_line


class Checked(ConfigBase):
    """A configuration that ``transformers`` reads from a ``config.json`` only as ``read_config`` does.

    Attributes:
        values: gives the attributes of a family's configuration, see ``families``, which sets it.
    """

    values: ClassVar[Callable[..., dict[str, Any]]]

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``transformers`` reads, with the name of the folder, whose tokenizer may be needed.

        Raises:
            ValueError: what ``read_object`` raises of a folder's ``config.json``.
        """
        path = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "", "config.json")
        is_here = path.is_file()
        if is_here:
            read_object(path)  # which refuses what transformers would fail at
        content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        here = {_FOLDER: str(path.parent)} if is_here else {}
        return content | {"_name_or_path": str(pretrained_model_name_or_path)} | here, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration; keys that ask for remote code are not obeyed.

        Raises:
            ValueError: what ``read_config`` raises, or a hub id whose tokenizer is needed and can't be read.
        """
        content = dict(config_dict)
        name = content.pop(_FOLDER, None) or kwargs.get("name_or_path") or content.get("_name_or_path")
        path = Path(str(name or ""), "config.json")
        try:
            found = content.get("quantization_config")
            if found is not None and not isinstance(found, dict):
                raise ValueError(f"quantization_config: found {found!r:.80}, expected an object")
            values = Checked.values(cls.model_type, content, name, content.get("_commit_hash"))
            kept = {key: content[key] for key in _OF_TRANSFORMERS if content.get(key) is not None}
            with in_one_line():
                return super().from_dict(values | kept, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}" if name and path.is_file() else str(error)) from error


class Published(Checked):
    """A configuration that is also written in the layout of the published ``config.json``.

    Attributes:
        on_use: called before one is made, see ``integrations.auto``.
        written: gives the published ``config.json`` of a configuration; as ``values``.
    """

    on_use: ClassVar[Callable[[], None]] = staticmethod(lambda: None)
    written: ClassVar[Callable[..., str]]

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Make one, once what builds its model is known to ``transformers``."""
        Published.on_use()
        return super().__new__(cls)

    def to_json_string(self, use_diff: bool = True) -> str:
        """``config.json`` in the published layout, with what ``transformers`` adds to it."""
        content = self.to_dict()
        return Published.written(
            self, **{key: content[key] for key in _OF_TRANSFORMERS if content.get(key) is not None}
        )


_FOLDER = "_folder"  # of what ``get_config_dict`` has read, until ``from_dict`` has checked it
_OF_TRANSFORMERS = ("dtype", "torch_dtype", "quantization_config", "transformers_version")


class DreamConfig(Published, Qwen2Config):
    """Qwen2's configuration with the mask token of Dream's ``config.json``."""

    model_type = "Dream"
    is_causal = False
    mask_token_id: int | None = None


class LLaDAConfig(Published, LlamaConfig):
    """Llama's configuration with the mask token of LLaDA's ``config.json``."""

    model_type = "llada"
    is_causal = False
    mask_token_id: int | None = None
    bos_token_id: int | None = None  # where a file doesn't say it, Llama's is wrong
    eos_token_id: int | list[int] | None = None


class A2DQwen2Config(Published, Qwen2Config):
    """Qwen2's configuration with a mask token."""

    model_type = "a2d-qwen2"
    is_causal = False
    mask_token_id: int | None = None
    block_length: int | None = None  # where attention is block-causal


class A2DQwen3Config(Published, Qwen3Config):
    """Qwen3's configuration with a mask token."""

    model_type = "a2d-qwen3"
    is_causal = False
    mask_token_id: int | None = None
    block_length: int | None = None  # where attention is block-causal


class A2DLlamaConfig(Published, LlamaConfig):
    """Llama's configuration with a mask token."""

    model_type = "a2d-llama"
    is_causal = False
    mask_token_id: int | None = None
    block_length: int | None = None  # where attention is block-causal
    bos_token_id: int | None = None  # as for LLaDA
    eos_token_id: int | list[int] | None = None


class OpenDCoderConfig(Published, Qwen2Config):
    """Qwen2's configuration with a mask token."""

    model_type = "open-dcoder"
    is_causal = False
    mask_token_id: int | None = None


class SDARConfig(Published, Qwen3Config):
    """Qwen3's configuration with a mask token and the length of blocks (SDAR, arXiv 2510.06303)."""

    model_type = "sdar"
    is_causal = False
    mask_token_id: int | None = None
    block_length: int = 4


class FastDLLMConfig(Published, Qwen2Config):
    """Qwen2's configuration with a mask token and the length of blocks (Fast-dLLM v2, arXiv 2509.26328)."""

    model_type = "Fast_dLLM_Qwen"
    is_causal = False
    mask_token_id: int | None = None
    block_length: int = 32


class StableDiffCoderConfig(A2DLlamaConfig):
    """Llama's configuration with a mask token and the length of blocks (Stable-DiffCoder, arXiv 2601.15892)."""

    model_type = "stable-diffcoder"
    block_length: int = 4
