"""Hooks see and change each step of generating, which is that of the published loop."""

import itertools
from collections.abc import Callable

import pytest
import torch
from table_model import MASK, RandomIds, run_states
from torch import Tensor

from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.tokens import SAMPLERS
from thermo_lib.models.lm import DiffusionLM


class TestHooks:
    """Dream's hooks see each step's ids and logits, and what they return takes the place of these."""

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_hooks_that_change_nothing_change_nothing(self, tiny: DiffusionLM, prompts: Tensor, sampler: str) -> None:
        arguments = {"timesteps": 4, "sampler": sampler, "temperature": 1.0, "top_p": 0.9}
        plain = generate(tiny, prompts, **arguments)
        hooked = generate(
            tiny,
            prompts,
            on_logits=lambda step, ids, logits: logits,
            on_tokens=lambda step, ids, logits: ids,
            **arguments,
        )
        assert torch.equal(hooked, plain)

    def test_on_logits_sees_the_state_before_and_the_logits_of_all_positions(
        self, tiny: DiffusionLM, prompts: Tensor
    ) -> None:
        seen: list[int] = []
        before: list[Tensor] = []

        def look(step: int, ids: Tensor, logits: Tensor) -> Tensor:
            everywhere = torch.ones_like(ids, dtype=torch.bool)
            assert torch.equal(logits, tiny.logits(ids, everywhere).unflatten(0, ids.shape))
            assert torch.equal(ids == MASK, before[-1] == MASK)
            seen.append(step)
            return logits

        generate(tiny, prompts, timesteps=3, on_logits=look, on_state=lambda _, rows, x: before.append(x.clone()))
        assert seen == [0, 1, 2]

    def test_what_on_logits_returns_is_sampled_from(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        def only_seven(step: int, ids: Tensor, logits: Tensor) -> Tensor:
            changed = torch.full_like(logits, -1e30)
            changed[..., 7] = 0
            return changed

        text = generate(tiny, prompts, timesteps=3, temperature=1.0, on_logits=only_seven)
        assert torch.equal(text, torch.where(prompts == MASK, 7, prompts))

    def test_on_tokens_sees_the_state_after_the_step_and_the_changed_logits(
        self, tiny: DiffusionLM, prompts: Tensor
    ) -> None:
        after: list[Tensor] = []
        before: list[Tensor] = []

        def look(step: int | None, ids: Tensor, logits: Tensor | None) -> Tensor:
            if step is None:
                assert logits is None
                assert not before
                assert torch.equal(ids, prompts)
            else:
                assert logits.shape[:2] == ids.shape
                assert logits.max() <= 1
                after.append(ids.clone())
            return ids

        text = generate(
            tiny,
            prompts,
            timesteps=3,
            on_state=lambda _, rows, x: before.append(x.clone()),
            on_logits=lambda step, ids, logits: logits.clamp(max=1),
            on_tokens=look,
        )
        for state, previous in zip([*before[1:], text], after, strict=True):
            assert torch.equal(state, previous)

    def test_what_on_tokens_masks_is_filled_again(self, tiny: DiffusionLM, prompts: Tensor) -> None:
        def remask_first(step: int | None, ids: Tensor, logits: Tensor | None) -> Tensor:
            return ids if step in (None, 2) else torch.cat([torch.full_like(ids[:, :1], MASK), ids[:, 1:]], dim=1)

        states = run_states(tiny, prompts, timesteps=3, block_length=3, on_tokens=remask_first)
        assert (prompts[:, 0] != MASK).any()
        assert all((x[:, 0] == MASK).all() for x in states[1:3])
        assert not (states[3] == MASK).any()

    def test_generation_starts_from_what_on_tokens_returns_before_the_first_step(
        self, tiny: DiffusionLM, prompts: Tensor
    ) -> None:
        # Three positions more are visible; the others are numbered into blocks without them.
        start = torch.cat([prompts[:, :-3], torch.full((5, 3), 7)], dim=1)
        most = int((start == MASK).sum(1).max())
        arguments = {"timesteps": 2 * -(-most // 2), "block_length": 2}
        assert (prompts == MASK).sum(1).max() > most + 1  # so that the blocks of the prompts alone would be more
        text = generate(
            tiny, prompts, on_tokens=lambda step, ids, _: start[: len(ids)] if step is None else ids, **arguments
        )
        assert torch.equal(text, generate(tiny, start, **arguments))

    def test_hooks_are_called_at_every_step_with_logits_also_when_nothing_is_left(self, tiny: DiffusionLM) -> None:
        seen: list[tuple[str, int | None, bool]] = []
        ids = torch.full((1, 4), 9)

        def look(name: str, result: int) -> Callable[..., Tensor]:
            return lambda *given: seen.append((name, given[0], given[2] is not None)) or given[result]

        generate(tiny, ids, timesteps=2, on_logits=look("logits", 2), on_tokens=look("tokens", 1))
        steps = [(name, step, True) for step in range(2) for name in ("logits", "tokens")]
        assert seen == [("tokens", None, False), *steps]

    @pytest.mark.parametrize("hook", ["on_logits", "on_tokens"])
    @pytest.mark.parametrize(("returned", "found"), [(None, "None"), (torch.zeros(2), r"\(2,\)")])
    def test_a_result_of_another_shape_is_refused(
        self, tiny: DiffusionLM, prompts: Tensor, hook: str, returned: object, found: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"{hook}: returned {found}, expected a tensor of shape \(5, 14"):
            generate(tiny, prompts, timesteps=2, **{hook: lambda *_: returned})


def published_loop(
    lm: DiffusionLM,
    x: Tensor,
    steps: int,
    sampler: str,
    top_p: float | None,
    top_k: int | None,
    hooks: tuple[Callable[..., Tensor], Callable[..., Tensor]],
) -> Tensor:
    """Dream's sampling loop at temperature 0 (arXiv 2508.15487) of one sequence, a position at a time in float64."""
    on_tokens, on_logits = hooks
    x = on_tokens(None, x.clone(), None)
    schedule = [1 + (1e-3 - 1) * i / steps for i in range(steps + 1)]
    for step, (t, s) in enumerate(itertools.pairwise(schedule)):
        logits = lm.model(x).logits
        logits[..., lm.mask_token_id] = -torch.inf  # which the published loop doesn't
        logits = on_logits(step, x, logits)
        surest = []
        for place in (x[0] == lm.mask_token_id).nonzero().flatten().tolist():
            probabilities, order = logits[0, place].double().softmax(-1).sort(descending=True)
            count = int((probabilities.cumsum(0) - probabilities <= (1 if top_p is None else top_p)).sum())
            kept = probabilities[: min(count, top_k or count)]
            kept = torch.cat([kept / kept.sum(), torch.zeros(1, dtype=torch.float64)])
            score = {
                "maskgit_plus": kept[0],
                "topk_margin": kept[0] - kept[1],
                "entropy": (kept * (kept + 1e-10).log()).sum(),
            }[sampler]
            surest.append((-score.item(), place, order[0].item()))
        filled = len(surest) if step == steps - 1 else int(len(surest) * (1 - s / t))
        for _, place, token in sorted(surest)[:filled]:
            x[0, place] = token
        x = on_tokens(step, x, logits)
    return x


class TestPublishedLoop:
    """``generate`` writes what Dream's published loop writes."""

    @pytest.fixture
    def unsure(self, build_tiny: Callable[[int], DiffusionLM]) -> DiffusionLM:
        """A model whose nuclei have several tokens, so that no two positions are equally sure after the filters."""
        lm = build_tiny(0)
        lm.model.lm_head.weight.mul_(0.3)
        return lm

    @pytest.mark.parametrize(("top_p", "top_k", "has_hooks"), [(None, None, False), (0.6, 5, False), (0.6, 5, True)])
    @pytest.mark.parametrize("sampler", ["maskgit_plus", "topk_margin", "entropy"])
    def test_greedy_texts_are_equal(
        self,
        unsure: DiffusionLM,
        random_ids: RandomIds,
        sampler: str,
        top_p: float | None,
        top_k: int | None,
        has_hooks: bool,
    ) -> None:
        def pin(step: int | None, ids: Tensor, logits: Tensor | None) -> Tensor:
            return torch.cat([ids[:, :-2], torch.tensor([[7, 8]])], dim=1) if has_hooks else ids

        def from_the_right(step: int, ids: Tensor, logits: Tensor) -> Tensor:
            # Each position's logits lean on its right neighbour's, filled or not.
            return logits + 0.5 * logits.roll(-1, 1).clamp(min=-1e3) if has_hooks else logits

        differing = 0
        for masked, steps in ((8, 8), (12, 5), (16, 4), (6, 12), (24, 16)):
            ids = torch.cat([random_ids(1, 5, seed=masked), torch.full((1, masked), MASK)], dim=1)
            settings = {"timesteps": steps, "sampler": sampler, "top_p": top_p, "top_k": top_k}
            hooks = {"on_tokens": pin, "on_logits": from_the_right} if has_hooks else {}
            text = generate(unsure, ids, **settings, **hooks)
            assert torch.equal(text, published_loop(unsure, ids, steps, sampler, top_p, top_k, (pin, from_the_right)))
            differing += not torch.equal(text, generate(unsure, ids, **settings, **hooks, eps=0.0))
        assert differing  # so that the schedule counts
