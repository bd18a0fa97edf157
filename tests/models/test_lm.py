"""Logits are those of the published architecture, whatever the padding and the chosen positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from thermo_lib.models.lm import DiffusionLM

RandomIds = Callable[..., Tensor]


class TestForward:
    """Qwen2 blocks with attention in both directions, and position i predicts token i."""

    def test_a_later_token_changes_earlier_logits(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        ids = random_ids(1, 8)
        changed = ids.clone()
        changed[0, -1] = 5 if ids[0, -1] != 5 else 6
        difference = (tiny.model(ids).logits - tiny.model(changed).logits).abs().amax(-1)[0]
        assert (difference > 1e-3).all()

    def test_logits_are_those_of_qwen2_without_causality_shifted_by_one(
        self, tiny: DiffusionLM, random_ids: RandomIds
    ) -> None:
        c = tiny.model.config
        plain = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=c.vocab_size,
                hidden_size=c.hidden_size,
                intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_hidden_layers,
                num_attention_heads=c.num_attention_heads,
                num_key_value_heads=c.num_key_value_heads,
                tie_word_embeddings=False,
                attn_implementation="eager",
            )
        ).eval()
        plain.load_state_dict(tiny.model.state_dict())
        ids = random_ids(2, 9)
        everything_visible = torch.zeros(2, 1, 9, 9)
        with torch.no_grad():
            expected = plain(ids, attention_mask=everything_visible).logits
            causal = plain(ids).logits
        logits = tiny.model(ids).logits
        torch.testing.assert_close(logits[:, 1:], expected[:, :-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)
        assert (causal - expected).abs().max() > 1

    @pytest.mark.parametrize("pad", [1, 5])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_left_padding_does_not_change_the_logits(
        self, build_tiny: Callable[[int], DiffusionLM], random_ids: RandomIds, attention: str, pad: int
    ) -> None:
        model = build_tiny(0).model
        model.set_attn_implementation(attention)
        ids = random_ids(2, 7)
        padded = torch.cat([random_ids(2, pad, seed=1), ids], dim=1)
        is_text = torch.arange(pad + 7).expand(2, -1) >= pad
        torch.testing.assert_close(model(padded, is_text).logits[:, pad:], model(ids).logits, rtol=1e-3, atol=1e-3)

    def test_a_mask_without_padding_changes_nothing(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        ids = random_ids(2, 7)
        torch.testing.assert_close(
            tiny.model(ids, torch.ones_like(ids, dtype=torch.bool)).logits, tiny.model(ids).logits, rtol=1e-4, atol=1e-4
        )

    def test_chosen_positions_come_in_row_order_and_a_mask_token_is_never_predicted(
        self, tiny: DiffusionLM, random_ids: RandomIds
    ) -> None:
        ids = random_ids(3, 5)
        at = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
        chosen, everywhere = tiny.logits(ids, at), tiny.model(ids).logits
        other = [i for i in range(everywhere.shape[-1]) if i != tiny.mask_token_id]
        torch.testing.assert_close(chosen[:, other], everywhere[at][:, other], rtol=1e-4, atol=1e-4)
        assert (chosen.softmax(-1)[:, tiny.mask_token_id] == 0).all()

    @pytest.mark.parametrize("pad", [1, 4])
    def test_chosen_logits_of_a_padded_row_are_those_of_the_row_alone(
        self, tiny: DiffusionLM, random_ids: RandomIds, pad: int
    ) -> None:
        ids = random_ids(2, 6)
        padded = torch.cat([random_ids(2, pad, seed=1), ids], dim=1)
        is_text = torch.arange(pad + 6).expand(2, -1) >= pad
        everything = torch.ones_like(ids, dtype=torch.bool)
        torch.testing.assert_close(
            tiny.logits(padded, is_text, is_text), tiny.logits(ids, everything), rtol=1e-3, atol=1e-3
        )

    @pytest.mark.parametrize("unknown", [-1, 9999])
    def test_an_id_outside_the_vocabulary_is_named(
        self, tiny: DiffusionLM, random_ids: RandomIds, unknown: int
    ) -> None:
        ids = random_ids(1, 3)
        ids[0, 1] = unknown
        with pytest.raises(
            ValueError, match=rf"ids: found {unknown}, allowed are 0\.\.{tiny.model.config.vocab_size - 1}"
        ):
            tiny.logits(ids, ids == tiny.mask_token_id)

    def test_equal_seeds_give_equal_weights(self, build_tiny: Callable[[int], DiffusionLM]) -> None:
        first, again, other = (build_tiny(seed).model.state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("is_captured", [False, True])
def test_attention_is_given_no_mask_without_padding(
    tiny: DiffusionLM, monkeypatch: pytest.MonkeyPatch, random_ids: Callable[..., Tensor], is_captured: bool
) -> None:
    """Nor where a CUDA graph is captured, for which ``transformers`` would make one: attention is slower with it."""
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def record(*given: Any, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        masks.append(attn_mask)
        return attention(*given, attn_mask=attn_mask, **more)

    expected = tiny.model(random_ids(2, 9)).logits
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: is_captured)
    assert torch.equal(tiny.model(random_ids(2, 9)).logits, expected)
    assert masks == [None] * tiny.model.config.num_hidden_layers
