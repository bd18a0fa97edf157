"""The models in plain ``transformers`` modules.

All are mask predictors: transformers with attention in both directions, in some of them inside a block and to earlier
ones only, that predict the tokens at masked positions. ``families.ARCHITECTURES`` says how they differ:

- Dream (arXiv 2508.15487) has Qwen2 blocks. Its logits are shifted by one: the state at position ``i - 1``
  predicts token ``i``, as in the autoregressive model it was initialized from.
- LLaDA (arXiv 2502.09992) has Llama blocks and was trained from scratch: position ``i`` predicts token ``i``, as it
  does in BERT and its like.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    EsmForMaskedLM,
    LlamaForCausalLM,
    ModernBertForMaskedLM,
    PreTrainedConfig,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    RobertaForMaskedLM,
)
from transformers.modeling_outputs import MaskedLMOutput

from thermo_lib.files.tensors import (
    check_finite,
    check_full_precision,
    check_inside,
    check_shapes,
    open_safetensors,
    read_headers,
)
from thermo_lib.models.families import ARCHITECTURES, stored_names, tensor_name, used
from thermo_lib.models.for_transformers import check_request
from thermo_lib.models.key_values import BlockByBlock
from thermo_lib.models.passes import BLOCK_CAUSAL, PASSES, DecoderPass, Norm, hiding
from thermo_lib.models.saved import save_into
from thermo_lib.models.settings import Architecture, Parts
from thermo_lib.quant.calls import CurrentStep, denoising
from thermo_lib.quant.time_norms import check_plain_norms


class MaskPredictor(BlockByBlock, nn.Module):
    """What the architectures share; mixed into a ``...ForCausalLM`` or ``...ForMaskedLM`` of ``transformers``.

    Attributes:
        is_shifted: whether the state at position ``i - 1`` predicts token ``i``.
        parts: what the model calls its parts.
        passes: how a forward pass goes through it.
    """

    is_shifted: bool
    parts: Parts
    passes: DecoderPass

    folder: Path | None = None  # that from_pretrained or load_model has read
    generate: ClassVar[Callable[..., Any]]  # see integrations.generation
    diffusion_generate: ClassVar[Callable[..., Any]]

    def __init__(self, config: PreTrainedConfig):
        # The embeddings would keep the padding token's row from training, and refuse an id that they don't have.
        pad, config.pad_token_id = config.pad_token_id, None
        super().__init__(config)
        self.config.pad_token_id = pad
        if self.can_generate():
            self.generation_config.pad_token_id = pad
        self.step = CurrentStep()
        self.passes.prepare(self)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in their order."""
        return attrgetter(self.parts.blocks)(self)

    @property
    def norm(self) -> Norm:
        """A norm outside the blocks, which is of the type and on the device of what isn't quantized."""
        return attrgetter(self.parts.norm)(self)

    @property
    def rotary(self) -> nn.Module | None:
        """What turns queries and keys by their position; None where positions are embedded."""
        return None if self.parts.rotary is None else attrgetter(self.parts.rotary)(self)

    @property
    def device(self) -> torch.device:
        """Where the model computes, also if its embeddings are elsewhere."""
        return self.norm.weight.device

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The last hidden states, in such order that position ``i`` predicts token ``i``.

        Args:
            input_ids: int64 ``(batch, length)``.
            attention_mask: bool ``(batch, length)``, False at padding; None when there is none.

        Returns:
            ``(batch, length, hidden)``; ``predict`` turns it into logits.

        Raises:
            ValueError: ids on another device than the model, or more tokens than it has positions for.
        """
        if input_ids.device != self.device and not getattr(self, "hf_device_map", None):
            raise ValueError(f"input_ids: found on {input_ids.device}, expected on {self.device}, where the model is")
        self._check_length(input_ids)
        position_ids = None
        bias = None
        if attention_mask is not None:
            hidden_keys = ~attention_mask.bool()[:, None, None, :].expand(-1, 1, input_ids.shape[1], -1)
            bias = hiding(hidden_keys.to(input_ids.device), self.norm.weight.dtype)
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        with denoising(self.step.value, input_ids == self.config.mask_token_id):
            states = self._states(input_ids, attention_mask, bias, position_ids)
        return _shift(states, attention_mask) if self.is_shifted else states

    def predict(self, states: Tensor) -> Tensor:
        """Logits ``(..., vocabulary)`` from ``hidden``'s states ``(..., hidden)``."""
        return self.passes.predict(self, states)

    def enter(self, input_ids: Tensor) -> Tensor:
        """What enters the first block, ``(batch, length, hidden)``, of ids ``(batch, length)`` without padding.

        Raises:
            ValueError: more tokens than the model has positions for.
        """
        self._check_length(input_ids)
        return self.passes.enter(self, input_ids, _positions(input_ids), None)

    @property
    def longest(self) -> int:
        """How many tokens a text may have, or for how many the model was made where more aren't refused."""
        return self.passes.longest(self.config) or self.config.max_position_embeddings

    def _check_length(self, input_ids: Tensor) -> None:
        length, most = input_ids.shape[1], self.passes.longest(self.config)
        if most is not None and length > most:
            because = f"with max_position_embeddings={self.config.max_position_embeddings}"
            raise ValueError(f"input_ids: found a length of {length}, allowed is at most {most} {because}")

    def block_arguments(self, hidden: Tensor) -> list[dict[str, Any]]:
        """What each block is given beside hidden states ``(batch, length, hidden)``, without padding."""
        return self.passes.arguments(self, hidden, None, _positions(hidden))

    def _states(
        self, input_ids: Tensor, visible: Tensor | None, bias: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """What ``transformers``' model computes, without a causal mask to skip.

        To find out that there is none it reads a tensor, and where a CUDA graph is captured it makes one instead,
        with which attention takes several times as long.
        """
        positions = _positions(input_ids) if position_ids is None else position_ids
        hidden = self.passes.enter(self, input_ids, positions, visible)
        for block, given in zip(self.blocks, self.passes.arguments(self, hidden, bias, positions), strict=True):
            hidden = block(hidden, **given)
        return self.passes.leave(self, hidden)

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        """Say which denoising step the model computes for from now on, in this thread; the first until it is said.

        Args:
            timestep: ``i`` in ``0..timesteps-1``.
            timesteps: ``T`` of the run; layers calibrated with another T take the step at the same mask ratio.

        Raises:
            ValueError: a timestep outside ``0..timesteps-1``.
        """
        self.step.set(timestep, timesteps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits of the token at each position, as ``transformers``' masked language models give them.

        Args:
            input_ids: int64 ``(batch, length)``.
            attention_mask: bool or 0 and 1, ``(batch, length)``, False at padding; None when there is none.
            labels: int64 ``(batch, length)``, the right tokens, -100 where the loss counts nothing; None for no loss.
            return_dict: False for a tuple; None for what the configuration says.
            others: other arguments of ``transformers``' models, which may be None or False, ``token_type_ids`` all 0.

        Returns:
            ``logits`` ``(batch, length, vocabulary)`` in the model's type, and with labels ``loss``, the mean cross
            entropy in nats, float32; of a tuple the loss comes first.

        Raises:
            ValueError: another argument that is set, or what ``hidden`` raises.
        """
        for name, value in others.items():
            is_neutral = name == "token_type_ids" and isinstance(value, Tensor) and not value.any()
            if value is not None and value is not False and not is_neutral:
                allowed = "allowed are input_ids, attention_mask, labels and return_dict"
                raise ValueError(f"{name}: found {value!r:.80}, {allowed}")
        logits = self.predict(self.hidden(input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device))
        found = MaskedLMOutput(loss=loss, logits=logits)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return found if wants_dict else found.to_tuple()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the model; the frequencies of its positions stay as precise as in a model loaded so."""
        positions = self.rotary
        before = {} if positions is None else dict(positions.named_buffers())
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            changed = getattr(positions, name)
            if changed.dtype != tensor.dtype:
                setattr(positions, name, tensor.to(changed.device))
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """What ``transformers`` loads from safetensors files that hold the model's tensors and nothing else.

        Raises:
            ValueError: what ``load_model`` raises of settings and weights: none, pickled, not complete, missing,
                unexpected, or of another shape or type than full precision has, NaN or infinity.
        """
        check_request(pretrained_model_name_or_path, kwargs)
        kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *more: Any
    ) -> Any:
        """The step of ``from_pretrained`` that knows the files; ``transformers`` itself would fill in what is missing.

        Of a folder that is quantized already its quantizer checks the files.
        """
        model.folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        quantizer = load_config.hf_quantizer
        if not checkpoint_files or (quantizer is not None and quantizer.pre_quantized):
            return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *more)
        folder, found = check_checkpoint(checkpoint_files, model.config)
        loaded = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *more)
        for name, tensor in model.state_dict().items():
            key = tensor_name(model.config, name)
            if not tensor.is_meta:  # as a tied head is until it is tied
                is_cast = key in found and found[key].dtype != tensor.dtype
                check_finite(tensor, f"{key} as {tensor.dtype}" if is_cast else key, folder)
        return loaded

    def save_pretrained(  # type: ignore[override]  # what follows state_dict is given by name only
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Write the model as ``transformers`` does, with the tokenizer of the folder that it was loaded from, if any.

        What is in the folder stays whole until all is written; files that aren't a model's stay.

        Raises:
            ValueError: a quantized model that wasn't loaded by ``from_pretrained``, which knows how to store it, or
                with a ``state_dict``; or one with time-aware norms that isn't quantized.
        """
        is_quantized = any(hasattr(module, "packed") for module in self.modules())
        if getattr(self, "hf_quantizer", None) is None and is_quantized:
            expected = "expected a full-precision model, or one that from_pretrained has loaded; use save_quantized"
            raise ValueError(f"save_pretrained: found a quantized model, {expected}")
        if not is_quantized:
            check_plain_norms(self)
        if is_quantized and state_dict is not None:
            allowed = "allowed is None, since codes are saved with their layers' parameters"
            instead = "call save_pretrained of the model that has that state"
            raise ValueError(f"state_dict: found one for a quantized model, {allowed}; {instead}")
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        write = super().save_pretrained

        def save(folder: str | Path) -> None:
            write(folder, is_main_process, state_dict, **kwargs)

        if is_main_process and not kwargs.get("distributed_checkpoint"):  # of which each process writes a part
            save_into(save_directory, save, self.folder)
        else:
            save(save_directory)


def checkpoint_folder(files: Sequence[str] | None, config: PreTrainedConfig) -> tuple[Path, list[Path]]:
    """The folder of a checkpoint, and its files.

    Args:
        files: that ``transformers`` found, the shards by what the index calls them.
        config: of the model, with the name of its folder, or a hub id; then the folder is that of the first file.

    Raises:
        ValueError: no files, one that isn't safetensors, or one that isn't inside the folder.
    """
    if not files:
        raise ValueError("model: found no files, expected a folder or a hub id with safetensors")
    paths = [Path(file) for file in files]
    name = config.name_or_path
    folder = Path(name) if name is not None and Path(name).is_dir() else paths[0].parent
    check_inside(paths, folder)
    return folder, paths


def check_checkpoint(files: Sequence[str], config: PreTrainedConfig) -> tuple[Path, dict[str, Tensor]]:
    """Check the files of a full-precision checkpoint as ``load_model`` does, but for NaN and infinity.

    Args:
        files: that ``transformers`` found.
        config: of the model.

    Returns:
        The folder, and what ``read_headers`` has found in it.

    Raises:
        ValueError: what ``checkpoint_folder``, ``read_headers`` and ``check_shapes`` raise, a type that isn't of full
            precision, or codes without a ``quantization_config``.
    """
    folder, paths = checkpoint_folder(files, config)
    found = used(read_headers(paths), config)
    if codes := sorted(name for name in found if name.endswith(".packed")):
        required = f"required by tensors {', '.join(codes[:5])} ({len(codes)} in all)"
        raise ValueError(f"{folder / 'config.json'}: quantization_config: found none, {required}")
    expected = skeleton(config).state_dict()
    names = stored_names(found, config, expected)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    check_shapes(shapes, {stored: expected[name] for stored, name in names.items()}, folder)
    for name, tensor in found.items():
        check_full_precision(tensor.dtype, name, folder)

    def read(name: str) -> Tensor:
        for path in paths:
            with open_safetensors(path) as file:
                if name in file.keys():
                    return file.get_tensor(name)
        raise KeyError(name)

    check_tied(found, config, read, folder)
    return folder, found


def check_tied(found: Container[str], config: PreTrainedConfig, read: Callable[[str], Tensor], where: Path) -> None:
    """Raise ValueError for a tensor that is stored and isn't what it is tied to, which would drop it without a word.

    Args:
        found: names of a full-precision checkpoint's tensors.
        config: of the model.
        read: gives such a tensor.
        where: the checkpoint.
    """
    architecture = ARCHITECTURES[config.model_type]
    if not config.tie_word_embeddings:
        return
    for tied, shared in architecture.parts.tied.items():
        head, embeddings = (tensor_name(config, name) for name in (tied, shared))
        if head in found and not read(head).equal(read(embeddings)):
            tying = next(key for key, value in architecture.settings.items() if value == "tie_word_embeddings")
            raise ValueError(
                f"{where}: tensor {head}: found another than {embeddings}, allowed is the same with {tying} true in "
                f"config.json; set it to false to use this head, or remove this tensor"
            )


def _shift(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    shifted = torch.cat([states[:, :1], states[:, :-1]], dim=1)
    if attention_mask is None:
        return shifted
    # A first token has no state before it and keeps its own, with or without padding on its left.
    after_padding = ~nn.functional.pad(attention_mask.bool()[:, :-1], (1, 0))
    return torch.where(after_padding[..., None], states, shifted)


def _positions(tokens: Tensor) -> Tensor:
    """Positions from 0, ``(1, length)``, of tokens ``(batch, length, ...)``."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


_BLOCKS = {
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "llama": LlamaForCausalLM,
    "bert": BertForMaskedLM,
    "roberta": RobertaForMaskedLM,
    "esm": EsmForMaskedLM,
    "modernbert": ModernBertForMaskedLM,
}


def _model_class(family: Architecture) -> type[MaskPredictor]:
    """The class of a family's models, named as its configuration; ``transformers`` wants one for each."""
    about = {
        "__module__": __name__,
        "__doc__": f"The model of ``{family.config.__name__}``, see ``MaskPredictor``.",
        "config_class": family.config,
        "is_shifted": family.is_shifted,
        "parts": family.parts,
        "passes": PASSES[family.blocks] if family.attention != "block-causal" else BLOCK_CAUSAL,
    }
    if family.attention == "either":
        full = PASSES[family.blocks]
        about["passes"] = property(lambda self: full if self.config.block_length is None else BLOCK_CAUSAL)
    name = family.config.__name__.removesuffix("Config") + "Model"
    return type(name, (MaskPredictor, _BLOCKS[family.blocks]), about)


MODELS = {model_type: _model_class(family) for model_type, family in ARCHITECTURES.items()}
if TYPE_CHECKING:  # a class that is made while the program runs is no type
    DreamModel = MaskPredictor
    LLaDAModel = MaskPredictor
else:
    DreamModel, LLaDAModel = MODELS["Dream"], MODELS["llada"]


def build_model(config: PreTrainedConfig) -> MaskPredictor:
    """The model of a configuration, randomly initialized, float32."""
    with _float32():
        return MODELS[config.model_type](config)


@contextmanager
def _float32() -> Iterator[None]:
    """Parameters that are made are float32: modules of ``transformers`` take the process's default and no dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def skeleton(config: PreTrainedConfig) -> MaskPredictor:
    """The model of a configuration without memory for its weights, on the meta device."""
    with torch.device("meta"):
        return build_model(config)
