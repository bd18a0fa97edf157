"""Masked language models as absorbing diffusion: BERT, RoBERTa, ModernBERT and ESM.

Each predicts the tokens at masked positions from both sides, which is a denoising step at any mask ratio
(DiffusionBERT, arXiv 2211.15029; DPLM, arXiv 2402.18567). ``config.json`` is that of ``transformers``, which loads the
same files.
"""

from typing import Any

from transformers import BertConfig, EsmConfig, ModernBertConfig, RobertaConfig

from thermo_lib.models.published import Checked
from thermo_lib.models.settings import TOKEN_IDS, Architecture, Parts, flat_rope, same


class MaskedBertConfig(Checked, BertConfig):
    """BERT's configuration with a mask token."""

    mask_token_id: int | None = None


class MaskedRobertaConfig(Checked, RobertaConfig):
    """RoBERTa's configuration with a mask token."""

    mask_token_id: int | None = None


class MaskedEsmConfig(Checked, EsmConfig):
    """ESM's configuration, which has a mask token."""


class MaskedModernBertConfig(Checked, ModernBertConfig):
    """ModernBERT's configuration with a mask token and the settings that its published files have."""

    mask_token_id: int | None = None
    global_attn_every_n_layers: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        """Say which layers see everything: every n-th, from the first on."""
        every, number = self.global_attn_every_n_layers, self.num_hidden_layers
        self.layer_types = ["sliding_attention" if i % every else "full_attention" for i in range(number)]
        super().__post_init__(**kwargs)

    @property
    def global_rope_theta(self) -> float:
        """Base of the rotary embedding in layers that see everything."""
        assert self.rope_parameters is not None  # __post_init__ fills them in
        return self.rope_parameters["full_attention"]["rope_theta"]

    @property
    def local_rope_theta(self) -> float:
        """Base of the rotary embedding in the other layers."""
        assert self.rope_parameters is not None
        return self.rope_parameters["sliding_attention"]["rope_theta"]


def _flat_modernbert(content: dict[str, Any]) -> dict[str, Any]:
    """The settings by their published keys, where ``transformers`` 5 wrote them for each kind of layer."""
    content = dict(content)
    rope, kinds = content.pop("rope_parameters", None), content.pop("layer_types", None)
    if not (rope is None or isinstance(rope, dict)):
        raise ValueError(f"rope_parameters: found {rope!r:.80}, allowed is an object for each kind of layer")
    if not (kinds is None or isinstance(kinds, list)):
        raise ValueError(f"layer_types: found {kinds!r:.80}, allowed is 'full_attention' for every n-th layer")
    for kind, key in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        if rope is not None:
            content |= {key: flat_rope({"rope_parameters": rope.get(kind)}).get("rope_theta", content.get(key))}
    if kinds is not None:
        every = kinds.index("full_attention", 1) if "full_attention" in kinds[1:] else max(1, len(kinds))
        if kinds != ["sliding_attention" if i % every else "full_attention" for i in range(len(kinds))]:
            raise ValueError(f"layer_types: found {kinds!r:.80}, allowed is 'full_attention' for every n-th layer")
        content["global_attn_every_n_layers"] = every
    return content


def _flat_esm(content: dict[str, Any]) -> dict[str, Any]:
    """The settings as they are; ``transformers`` writes null for a norm that isn't there."""
    content = flat_rope(content)
    return content | {"emb_layer_norm_before": content.get("emb_layer_norm_before") or False}


_SIZES = same(
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "mask_token_id"
)
_POSITIONS = same("max_position_embeddings")
_FIXED: dict[str, tuple[Any, ...]] = {"is_decoder": (False, None), "add_cross_attention": (False, None)}
_ABSOLUTE = _FIXED | {"position_embedding_type": ("absolute", None)}
_OLDER = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def _bert_parts(prefix: str, head: str) -> Parts:
    """The parts of BERT and RoBERTa; the head shares the embeddings and has a bias that it holds apart."""
    embeddings = f"{prefix}.embeddings"
    return Parts(
        blocks=f"{prefix}.encoder.layer",
        embeddings=f"{embeddings}.word_embeddings",
        norm=f"{embeddings}.LayerNorm",
        head=f"{head}.decoder",
        rotary=None,
        tied={
            f"{head}.decoder.weight": f"{embeddings}.word_embeddings.weight",
            f"{head}.decoder.bias": f"{head}.bias",
        },
    )


_BERT = Architecture(
    config=MaskedBertConfig,
    blocks="bert",
    parts=_bert_parts("bert", "cls.predictions"),
    is_shifted=False,
    published_as="BertForMaskedLM",
    sizes=_SIZES | _POSITIONS | same("type_vocab_size"),
    settings=same("layer_norm_eps", "tie_word_embeddings", "hidden_act") | TOKEN_IDS,
    fixed=_ABSOLUTE,
    mask_token="[MASK]",
    older=_OLDER,
    unused=("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids"),
)
_ROBERTA = Architecture(
    config=MaskedRobertaConfig,
    blocks="roberta",
    parts=_bert_parts("roberta", "lm_head"),
    is_shifted=False,
    published_as="RobertaForMaskedLM",
    sizes=_SIZES | _POSITIONS | same("type_vocab_size", "pad_token_id"),
    settings=same("layer_norm_eps", "tie_word_embeddings", "hidden_act", "bos_token_id", "eos_token_id"),
    fixed=_ABSOLUTE,
    mask_token="<mask>",
    older=_OLDER,
    unused=("roberta.pooler.", "roberta.embeddings.position_ids"),
)
_ESM = Architecture(
    config=MaskedEsmConfig,
    blocks="esm",
    parts=Parts(
        blocks="esm.encoder.layer",
        embeddings="esm.embeddings.word_embeddings",
        norm="esm.encoder.emb_layer_norm_after",
        head="lm_head.decoder",
        rotary="esm.rotary_embeddings",
        tied={"lm_head.decoder.weight": "esm.embeddings.word_embeddings.weight"},
    ),
    is_shifted=False,
    published_as="EsmForMaskedLM",
    sizes=_SIZES | _POSITIONS | same("pad_token_id"),
    settings=same(
        "layer_norm_eps",
        "tie_word_embeddings",
        "position_embedding_type",
        "emb_layer_norm_before",
        "token_dropout",
        "bos_token_id",
        "eos_token_id",
    ),
    flat=_flat_esm,
    fixed=_FIXED
    | {"is_folding_model": (False, None), "hidden_act": ("gelu", None), "rope_theta": (10000.0, 10000, None)},
    mask_token="<mask>",
    older=_OLDER,
    unused=("esm.pooler.", "esm.contact_head.", "esm.embeddings.position_ids", "rotary_embeddings.inv_freq"),
    # Models had them whether they used them or not (github.com/huggingface/transformers, pull request 39063).
    unused_if_rotary=("esm.embeddings.position_embeddings.",),
)
_MODERNBERT = Architecture(
    config=MaskedModernBertConfig,
    blocks="modernbert",
    parts=Parts(
        embeddings="model.embeddings.tok_embeddings",
        norm="model.final_norm",
        head="decoder",
        tied={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    ),
    is_shifted=False,
    published_as="ModernBertForMaskedLM",
    sizes=_SIZES | same("global_attn_every_n_layers", "local_attention"),
    settings=same(
        "max_position_embeddings",
        "norm_eps",
        "norm_bias",
        "global_rope_theta",
        "local_rope_theta",
        "attention_bias",
        "mlp_bias",
        "decoder_bias",
        "classifier_bias",
        "hidden_activation",
        "classifier_activation",
        "tie_word_embeddings",
        "cls_token_id",
        "sep_token_id",
    )
    | TOKEN_IDS,
    fixed={"rope_scaling": (None,)},
    mask_token="[MASK]",
    flat=_flat_modernbert,
)
ENCODERS = (_BERT, _ROBERTA, _MODERNBERT, _ESM)
