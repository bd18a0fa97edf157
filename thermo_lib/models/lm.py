"""Diffusion language models, loaded from published checkpoints without running checkpoint code, and saved.

Read are the layouts of ``families.ARCHITECTURES``, from safetensors only.
"""

import itertools
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from thermo_lib.files.folders import write_folder
from thermo_lib.files.hub import TEXTS, WEIGHTS, from_hub
from thermo_lib.files.reading import read_object
from thermo_lib.files.tensors import (
    WEIGHTS_NAME,
    cast,
    check_dtype,
    check_full_precision,
    check_tensors,
    read_headers,
    read_tensors,
    weight_files,
)
from thermo_lib.models.architectures import DreamModel, MaskPredictor, build_model, check_tied, skeleton
from thermo_lib.models.checks import LateChecks, check_logits
from thermo_lib.models.families import ARCHITECTURES, config_json, read_config, stored_names, tensor_name, used
from thermo_lib.models.published import DreamConfig
from thermo_lib.models.tokenization import (
    ChatTemplate,
    read_carried,
    read_chat_template,
    read_tokenizer,
    save_tokenizer,
)
from thermo_lib.models.vocabulary import NO_PROBABILITY, Vocabulary, check_known, end_token_ids
from thermo_lib.quant.time_norms import check_plain_norms

REFERENCE_DIR = Path(__file__).resolve().parent.parent / "reference"
_LOGITS = 2**25  # of a part of ``logit_parts``


@dataclass
class DiffusionLM:
    """A diffusion language model with its tokenizer.

    Attributes:
        model: of a class of ``architectures.MODELS``, its linear layers perhaps quantized.
        tokenizer: text to token ids; None where ``as_lm`` found none.
        mask_token_id: the id that stands for a masked position.
        name: where it was loaded from.
        chat_template: how to write a conversation; None for a model that wasn't tuned on any.
        carried: settings of tokenizer and generation that are saved as they were loaded, see ``read_carried``.
    """

    model: MaskPredictor
    tokenizer: Tokenizer
    mask_token_id: int
    name: str
    chat_template: ChatTemplate | None = field(default=None, kw_only=True)
    carried: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    _known: Vocabulary | None = field(default=None, init=False, repr=False, compare=False)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
    ) -> str:
        """A conversation as the model's text, ready for ``tokenizer.encode(text, add_special_tokens=False)``.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: end with the opening of an answer.
            template: name of another template than the default, of a model that has several.

        Raises:
            ValueError: the model has no chat template, or none of that name, or its template refuses the messages.
        """
        if self.chat_template is None:
            expected = "expected a model with chat_template.jinja, or chat_template in tokenizer_config.json"
            raise ValueError(f"chat: found no chat template in {self.name!r}, {expected}")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, template=template)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def identity(self) -> Mapping[str, Any]:
        """What tells the model's weights from others, for ``files.snapshots.digest``."""
        return self.model.state_dict()

    @property
    def end_token_id(self) -> int | None:
        """The first id that ends a text, by the model's configuration; None where it has none."""
        return next(iter(self.end_token_ids), None)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """All ids that end a text, by the model's configuration and, after those, ``generation_config.json``."""
        return end_token_ids(self.model, self.carried)

    @property
    def vocab_size(self) -> int:
        """Number of the model's ids; its tokenizer may have fewer."""
        return self.model.config.vocab_size

    @property
    def writable(self) -> Tensor:
        """The ids that may be written, int64 ``(n,)``, on the CPU: the tokenizer's but the mask and ``suppressed``."""
        return self._vocabulary().writable

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Ids that are never written: ``suppress_tokens`` of ``generation_config.json``.

        Raises:
            ValueError: not a list of ids of the model.
        """
        found = json.loads(self.carried.get("generation_config.json", "{}")).get("suppress_tokens") or ()
        if not (isinstance(found, list | tuple) and all(type(i) is int and 0 <= i < self.vocab_size for i in found)):
            allowed = f"allowed is a list of ids in 0..{self.vocab_size - 1}"
            raise ValueError(f"generation_config.json: suppress_tokens: found {found!r:.80}, {allowed}")
        return tuple(found)

    def _vocabulary(self) -> Vocabulary:
        """Which of the model's ids the tokenizer has; found out again where that is another or has grown."""
        size = 0 if self.tokenizer is None else self.tokenizer.get_vocab_size()
        known = self._known
        if known is None or known.tokenizer is not self.tokenizer or known.size != size:
            never = (self.mask_token_id, *self.suppressed)
            known = self._known = Vocabulary(self.tokenizer, size, self.vocab_size, never)
        return known

    def decode(self, ids: Tensor) -> str:
        """Text of token ids ``(length,)``, up to the first special token."""
        special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return self.tokenizer.decode(list(itertools.takewhile(lambda token: token not in special, ids.tolist())))

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        """See ``MaskPredictor.set_timestep``."""
        self.model.set_timestep(timestep, timesteps)

    @torch.no_grad()
    def logits(self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits at chosen positions only, which saves work in the head; see ``token_logits``.

        Args:
            ids: int64 ``(batch, length)``.
            at: bool ``(batch, length)``, True at ``n`` positions.
            attention_mask: bool ``(batch, length)``, False at padding on the left; None where there is none.

        Returns:
            ``(n, vocabulary)`` in row-major order of ``at``, float32 also of a model in bfloat16 or float16, on the
            device of ``ids``, which may be another than the model's.

        Raises:
            ValueError: ids outside the vocabulary, or logits that are NaN or infinite.
        """
        check_known(ids, self.vocab_size)
        return self.token_logits(self.model.predict(self._states(ids, at, attention_mask))).to(ids.device)

    @torch.no_grad()
    def logit_parts(
        self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None, *, late: LateChecks | None = None
    ) -> Iterator[Tensor]:
        """What ``logits`` returns, in parts of its rows that a large vocabulary doesn't make too large.

        Args:
            ids, attention_mask: see ``logits``.
            at: as for ``logits``, or the places of these positions in ``ids.flatten()``, int64 ``(n,)``.
            late: takes the checks of the logits, of ids that are known to be right; None makes all checks at once.
        """
        if late is None:
            check_known(ids, self.vocab_size)
        for states in self._states(ids, at, attention_mask).split(self.rows_at_a_time):
            yield self.token_logits(self.model.predict(states), late).to(ids.device)

    def token_logits(self, logits: Tensor, late: LateChecks | None = None) -> Tensor:
        """A head's output as logits of the tokens that may be written: other ids get no probability.

        A filled position is never a mask token (the zero masking probabilities of MDLM, arXiv 2406.07524), and never
        an id that the tokenizer doesn't have, such as those that fill up a model's vocabulary to a round number, or one
        that the model's files suppress.

        Args:
            logits: ``(n, vocabulary)``; overwritten if they are float32 or float64.
            late: takes the check of the logits; None makes it at once.

        Returns:
            ``(n, vocabulary)``, float32, or float64 if that is given: ``NO_PROBABILITY`` and small differences of log
            probabilities are lost in float16 and bfloat16.

        Raises:
            ValueError: logits that are NaN or infinite, as after an overflow of float16.
        """
        check_logits(logits, late)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        precise[:, self.mask_token_id] = NO_PROBABILITY
        return self._vocabulary().rule_out(precise)

    @property
    def rows_at_a_time(self) -> int:
        """Number of positions of a part of ``logit_parts``."""
        return max(1, _LOGITS // self.vocab_size)

    def _states(self, ids: Tensor, at: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The states from which the head predicts at chosen positions, ``(n, hidden)``."""
        device = self.model.device
        visible = None if attention_mask is None else attention_mask.to(device)
        at = at.to(device)
        places = (
            at.flatten().nonzero().flatten() if at.dtype == torch.bool else at
        )  # a GPU is waited for before the pass
        return self.model.hidden(ids.to(device), visible).flatten(0, 1)[places]


def build_reference(vocab_size: int, mask_token_id: int, sizes: dict[str, int], seed: int) -> DreamModel:
    """A randomly initialized reference model, float32; equal seeds give equal weights."""
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
    return build_model(config)


def take_expected(
    found: Mapping[str, Tensor], config: PreTrainedConfig, expected: Mapping[str, Tensor], where: Path
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the library's names: all that the model needs and no other.

    Args:
        found: the tensors by the names of ``config``'s architecture; what its models don't use is left out.
        config: the model's configuration.
        expected: the library's name to a tensor of the right shape; the head may be missing where it is tied.
        where: the checkpoint.

    Raises:
        ValueError: what ``check_tensors`` raises, in the names of the checkpoint.
    """
    found = used(found, config)
    names = stored_names(found, config, expected)
    check_tensors(found, {stored: expected[name] for stored, name in names.items()}, where)
    return {name: found[stored] for stored, name in names.items()}


def fill(model: MaskPredictor, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give a model that was built on the meta device its tensors, and make it ready to evaluate.

    Args:
        model: its parameters hold no memory yet.
        tensors: the library's name to tensor; emptied, so that no tensor is held twice.
        dtype: of the model's parameters.
    """
    for name in list(tensors):
        model.load_state_dict({name: tensors.pop(name).to(dtype)}, strict=False, assign=True)
    if isinstance(model.get_submodule(model.parts.head), nn.Linear):
        model.tie_weights()
    if model.rotary is not None:  # its numbers are in no checkpoint
        with torch.device("cpu"):
            positions = type(model.rotary)(config=model.config)
        for key, buffer in positions.named_buffers():
            model.rotary.register_buffer(key, buffer, persistent=False)
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
    try:
        return from_hub(name, *TEXTS, *WEIGHTS)
    except ConnectionError as error:
        allowed = "'reference', a folder with config.json and safetensors, or a reachable hub id"
        raise ValueError(f"model: found {name!r:.80}, allowed are {allowed} ({error})") from error


def load_model(
    name: str = "reference",
    *,
    family: str | None = None,
    block_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> DiffusionLM:
    """Load a full-precision diffusion language model, in evaluation mode.

    Args:
        name: ``"reference"`` for the embedded model, a local folder, or a hub id.
        family: what the model is, where its ``config.json`` is plain Qwen2, Qwen3 or Llama and says nothing of
            diffusion, e.g. ``"open-dcoder"``; what is saved or quantized from it says it.
        block_length: see ``read_config``; what is saved or quantized from it says it.
        dtype: of the weights in memory.
        progress: show bars.

    Raises:
        ValueError: unknown model, a quantized one, unsupported type, a family or a block length that is missing or
            doesn't fit, damaged weights, or more of them than memory; the message says which and why.
    """
    check_dtype(dtype)
    folder = model_folder(name)
    config = read_config(folder, family, block_length)
    check_unquantized(folder)
    tokenizer, chat_template = read_tokenizer(folder, config.vocab_size), read_chat_template(folder)
    model, carried = skeleton(config), read_carried(folder)
    found = used(read_tensors(folder, progress=progress), config)
    for key, tensor in found.items():
        check_full_precision(tensor.dtype, key, folder)
    tensors = take_expected(found, config, model.state_dict(), folder)
    check_tied(found, config, found.__getitem__, folder)
    cast(tensors, dtype, partial(tensor_name, config), folder, progress=progress)
    fill(model, tensors, dtype)
    model.folder = folder
    return DiffusionLM(model, tokenizer, config.mask_token_id, name, chat_template=chat_template, carried=carried)


def stored_dtype(name: str, family: str | None = None, block_length: int | None = None) -> torch.dtype:
    """The type in which a model's files hold what isn't quantized; raises what ``load_model`` raises of files."""
    folder = model_folder(name)
    config = read_config(folder, family, block_length)
    found = read_headers(weight_files(folder))
    key = last_norm(config, found)
    if key not in found:
        raise ValueError(f"{folder}: missing tensors {key} (1 in all)")
    check_full_precision(found[key].dtype, key, folder)
    return found[key].dtype


def last_norm(config: PreTrainedConfig, found: Container[str]) -> str:
    """What a checkpoint calls the weight of ``MaskPredictor.norm``, or that of its time groups, whichever it holds."""
    norm = ARCHITECTURES[config.model_type].parts.norm
    names = list(stored_names(found, config, [f"{norm}.weight", f"{norm}.time_weight"]))
    return next((name for name in names if name in found), names[0])


def check_unquantized(folder: Path) -> None:
    """Raise ValueError if a folder's ``config.json`` says that its weights are quantized."""
    path = folder / "config.json"
    found = read_object(path).get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method == "thermo":
        raise ValueError(f"model: found a quantized model in {folder}, load it with load_quantized")
    raise ValueError(f"{path}: quantization_config: found quant_method {method!r:.80}, allowed is a model without")


def save_model(
    lm: DiffusionLM,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    extra: Mapping[str, str] | None = None,
    kept: Sequence[str] = (),
) -> None:
    """Write a full-precision model as ``config.json``, ``model.safetensors``, ``tokenizer.json`` and its settings.

    An earlier folder of that name stays as it was until the new one is complete.

    Args:
        lm, folder: the model, and where to write it.
        dtype: of the stored weights.
        extra: more text files, name to content.
        kept: names of files of an earlier folder that stay.

    Raises:
        ValueError: time-aware norms, or what ``output_folder`` raises.
    """
    check_plain_norms(lm.model)
    check_dtype(dtype)

    def write(target: Path) -> None:
        config = lm.model.config
        state = {name: tensor.to(dtype).contiguous() for name, tensor in lm.model.state_dict().items()}
        tied = lm.model.parts.tied if config.tie_word_embeddings else ()
        state = {tensor_name(config, name): tensor for name, tensor in state.items() if name not in tied}
        save_file(state, target / WEIGHTS_NAME, metadata={"format": "pt"})
        (target / "config.json").write_text(config_json(config, torch_dtype=str(dtype).split(".")[1]))
        save_tokenizer(lm.tokenizer, lm.chat_template, target, lm.carried)
        for name, text in (extra or {}).items():
            (target / name).write_text(text, encoding="utf-8")

    write_folder(Path(folder), write, kept=kept)
