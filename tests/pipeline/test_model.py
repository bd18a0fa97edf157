"""A quantized model has the bits per weight that are worked out by hand, and a dense one computes what it does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from configurations import SMOOTH, Quantize, config_of
from torch import Tensor, nn

from thermo_lib import quantize
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import QuantizedLM, dequantized


class TestBitsPerWeight:
    """Bits of codes and parameters for each weight, worked out by hand.

    A block has q, k, v, o of 32 rows and columns, gate and up of 48 rows and 32 columns, down of 32 rows and 48
    columns: 4 * 1024 + 3 * 1536 = 8704 weights. In groups of 20, 32 columns have 2 groups and 48 have 3:
    4 * 32 * 2 + 2 * 48 * 2 + 32 * 3 = 544 groups of two float16: 544 * 32 = 17408 bits, 2 bits a weight.
    """

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, 2 + 2),
            ({"bit_width": 4}, 4 + 2),
            ({"bit_width": 8}, 8 + 2),
            ({"num_time_groups": 3}, 2 + 3 * 2),
            (SMOOTH, 2 + 3 * 2),  # smoothing stores nothing
            # 7 linears, each with 3 groups of a float32 scale and zero point: 7 * 3 * 64 = 1344 bits a block
            ({"activation_bits": 8, "num_time_groups": 3}, 2 + 2 + 1344 / 8704),
            ({"activation_bits": 8, "activation_ranges": "dynamic"}, 2 + 2),
            # One group a row: 4 * 32 + 2 * 48 + 32 = 256 groups, 256 * 32 / 8704 bits a weight
            ({"group_size": 64}, 2 + 256 * 32 / 8704),
            # Trellis: a float16 scale a group, no zero point, 4 bits a column: (6 * 32 + 48) * 4 bits
            ({"quantizer": "trellis", "group_size": 64}, 2 + (256 * 16 + 240 * 4) / 8704),
        ],
    )
    def test_golden(self, quantized: Quantize, changes: dict[str, Any], expected: float) -> None:
        assert quantized(**changes).bits_per_weight == pytest.approx(expected, rel=1e-12)

    def test_the_last_byte_of_a_row_counts_whole(self, build_tiny: Callable[[int], DiffusionLM]) -> None:
        # 3 input features at 2 bits take a byte a row; 4 rows: 32 bits of codes and 4 * 32 of parameters, 12 weights.
        lm = build_tiny(0)
        block = lm.model.model.layers[0]
        lm.model.model.layers = nn.ModuleList([nn.ModuleDict({"only": nn.Linear(3, 4, bias=False)})])
        assert quantize(lm, config_of()).bits_per_weight == (32 + 128) / 12
        assert block.self_attn.q_proj.weight.shape == (32, 32)


class TestDense:
    """Plain weights in the place of codes."""

    @pytest.mark.parametrize(
        "changes",
        [{}, {"embedding_bits": 8}, {"quantizer": "trellis", "average_bits": 2.2}, {"group_size": 20}],
        ids=str,
    )
    def test_it_computes_what_the_quantized_model_does(
        self, quantized: Quantize, random_ids: Callable[..., Tensor], changes: dict[str, Any]
    ) -> None:
        lm, ids = quantized(**changes), random_ids(2, 9)
        dense = dequantized(lm)
        assert not isinstance(dense, QuantizedLM)
        assert not any(hasattr(module, "packed") for module in dense.model.modules())
        assert torch.equal(dense.model(ids).logits, lm.model(ids).logits)
        assert lm.quantized_layers(), "the quantized model stays as it is"

    def test_a_tied_head_stays_tied(self, build_tiny: Callable[[int], DiffusionLM], random_ids: Callable[..., Tensor]):
        lm = build_tiny(0)
        lm.model.config.tie_word_embeddings = True
        lm.model.tie_weights()
        dense = dequantized(quantize(lm, config_of(quantizer="rtn", embedding_bits=8)))
        assert dense.model.lm_head.weight is dense.model.model.embed_tokens.weight

    @pytest.mark.parametrize(
        ("changes", "found"),
        [
            ({"activation_bits": 8, "activation_ranges": "dynamic"}, "dense: found quantized activations"),
            ({"num_time_groups": 3}, "dense: found weights that depend on the timestep"),
        ],
    )
    def test_what_no_plain_weight_does_is_refused(
        self, quantized: Quantize, changes: dict[str, Any], found: str
    ) -> None:
        with pytest.raises(ValueError, match=found):
            dequantized(quantized(**changes))
