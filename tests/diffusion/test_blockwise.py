"""Generating block by block with keys and values kept is what computing everything anew at each step is."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import BLOCK_CAUSAL, DREAM, FAST_DLLM, MASK_TOKEN_ID, SDAR, VOCABULARY, Layout
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel

from thermo_lib import ThermoConfig, calibrate, load_model, quantize
from thermo_lib.diffusion.sampling import generate
from thermo_lib.models.key_values import KeyValues
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.models.streamed import load_streamed

LENGTH = 17  # of texts, not whole blocks of any layout
STEPS = 3  # a block
PADS = (0, 3, 1, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[[Layout], Path]:
    """Gives a checkpoint of a layout."""
    root = tmp_path_factory.mktemp("published")

    def make(layout: Layout) -> Path:
        path = root / layout.model_type
        return path if path.exists() else layout.write(path, tokenizer, mask_token_id=MASK_TOKEN_ID, eos_token_id=4)

    return make


def made_once(make: Callable[[Layout], DiffusionLM]) -> Callable[[Layout], DiffusionLM]:
    """A function that makes a model of each layout once."""
    made: dict[str, DiffusionLM] = {}

    def get(layout: Layout) -> DiffusionLM:
        if layout.model_type not in made:
            made[layout.model_type] = make(layout)
        return made[layout.model_type]

    return get


@pytest.fixture(scope="module")
def load(folders: Callable[[Layout], Path]) -> Callable[[Layout], DiffusionLM]:
    """Loads a model of a layout, which tests don't change; in float64, so that the order of a sum decides no token."""
    return made_once(lambda layout: load_model(str(folders(layout)), dtype=torch.float64))


@pytest.fixture(scope="module")
def quantized(load: Callable[[Layout], DiffusionLM]) -> Callable[[Layout], DiffusionLM]:
    """A model whose activations have other ranges in each group of timesteps, and for masked tokens."""

    def make(layout: Layout) -> DiffusionLM:
        lm = load(layout)
        text = torch.randint(5, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))
        calibration = calibrate(lm, [(text, None)], timesteps=STEPS, source="forward", progress=False)
        config = ThermoConfig(
            quantizer="rtn",
            activation_bits=6,
            activations={"by_token_state": True},
            num_time_groups=STEPS,
            timesteps=STEPS,
            group_size=16,
        )
        return quantize(lm, config, calibration)

    return made_once(make)


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    """Four texts, padded on the left by ``PADS``, and where they are; prompts end at several places of a block."""
    ids = torch.randint(5, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(4))
    for row, start in enumerate((7, 7, 7, 0)):
        ids[row, start:] = MASK_TOKEN_ID
    ids[2, 12] = 9  # known between masks
    is_text = torch.arange(LENGTH) >= torch.tensor(PADS)[:, None]
    return ids.where(is_text, 0), is_text


@contextmanager
def swapped(lm: DiffusionLM, known: dict[str, Tensor] | None, seen: dict[str, Tensor]) -> Iterator[None]:
    """Puts known keys and values before those of a pass, and says what all of them were."""
    handles = []
    for number, block in enumerate(lm.model.blocks):
        attention = block.self_attn
        for name in ("k_norm" if hasattr(attention, "k_norm") else "k_proj", "v_proj"):

            def hook(_: Any, __: Any, out: Tensor, key: str = f"{number}.{name}") -> Tensor:
                if known is not None:
                    out = torch.cat([known[key], out[:, known[key].shape[1] :]], 1)
                seen[key] = out
                return out

            handles.append(getattr(attention, name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def anew(lm: DiffusionLM, text: Tensor, start: int, step: int, timesteps: int) -> Tensor:
    """Logits of a text ``(length,)`` from ``start`` on, earlier tokens at the last step, by passes over all of it."""
    with torch.no_grad():
        before: dict[str, Tensor] = {}
        lm.set_timestep(timesteps - 1, timesteps)
        with swapped(lm, None, before):
            at_the_end = lm.model.hidden(text[None])
        lm.set_timestep(step, timesteps)
        with swapped(lm, {key: value[:, :start] for key, value in before.items()}, {}):
            states = lm.model.hidden(text[None]).clone()
        if lm.model.is_shifted and start:
            states[:, start] = at_the_end[:, start]
        return lm.token_logits(lm.model.predict(states[0, start:]))


def recomputed(
    lm: DiffusionLM, text: Tensor, timesteps: int, threshold: float | None = None, suppress_tokens: Sequence[int] = ()
) -> Tensor:
    """A text ``(length,)`` filled block by block at temperature 0, the surest first, nothing kept."""
    text, length = text.clone(), lm.model.block_length
    starts = sorted({place // length * length for place in (text == MASK_TOKEN_ID).nonzero().flatten().tolist()})
    now = end_of_share = 0
    for number, start in enumerate(starts):
        steps = timesteps // len(starts) + (number < timesteps % len(starts))
        step, end_of_share = 0, end_of_share + steps
        end = min(start + length, len(text))
        masked = left = int((text[start:end] == MASK_TOKEN_ID).sum())
        while left:
            told = step * timesteps // steps if threshold is None else (masked - left) * timesteps // masked
            logits = anew(lm, text[:end], start, told, timesteps)
            logits[:, list(suppress_tokens)] = -torch.inf
            sure, tokens = logits.softmax(-1).max(-1)
            sure = sure.where(text[start:end] == MASK_TOKEN_ID, torch.tensor(-1.0))
            if threshold is None:
                share = 1 - (1 - (step + 1) * (1 - 1e-3) / steps) / (1 - step * (1 - 1e-3) / steps)
                count = left if step == steps - 1 else int(left * share)
            else:
                count = max(math.ceil(left / (end_of_share - now)), int((sure > threshold).sum()))
            chosen = sure.argsort(descending=True)[:count]
            text[start + chosen] = tokens[chosen]
            left, step, now = left - count, step + 1, now + 1
    return text


def steps_of(lm: DiffusionLM, ids: Tensor, is_text: Tensor) -> int:
    """Timesteps with which each block of the row with most of them takes ``STEPS``."""
    most = int(((ids == MASK_TOKEN_ID) & is_text).sum(1).max())
    return STEPS * -(-most // lm.model.block_length)


def filled(lm: DiffusionLM, ids: Tensor, **options: Any) -> Tensor:
    """What ``generate`` makes of it block by block, at temperature 0, the surest first; no end is known by default."""
    how = {"block_length": lm.model.block_length, "sampler": "maskgit_plus", "end_tokens": ()}
    return generate(lm, ids, **how | options)


def passes(lm: DiffusionLM, ids: Tensor, **options: Any) -> list[tuple[int, ...]]:
    """The shapes ``(rows, tokens)`` of what ``filled`` computes, pass by pass."""
    shapes: list[tuple[int, ...]] = []
    hook = lm.model.model.embed_tokens.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    try:
        filled(lm, ids, **options)
    finally:
        hook.remove()
    return shapes


class TestResult:
    """Texts are those of a loop that keeps nothing."""

    @pytest.mark.slow
    @BLOCK_CAUSAL
    @pytest.mark.parametrize(
        ("time_aware", "options"),
        [(False, {}), (True, {}), (True, {"threshold": 0.3}), (True, {"suppress_tokens": range(5, VOCABULARY, 2)})],
        ids=["full precision", "time-aware", "sure", "odd"],
    )
    def test_texts_are_those_of_computing_everything_anew(
        self,
        load: Any,
        quantized: Any,
        prompts: tuple[Tensor, Tensor],
        layout: Layout,
        time_aware: bool,
        options: dict[str, Any],
    ) -> None:
        lm, (ids, is_text) = (quantized if time_aware else load)(layout), prompts
        timesteps = steps_of(lm, ids, is_text)
        if time_aware:  # the step matters, or this would say nothing
            text = ids[0].clamp(min=5)
            first, last = (anew(lm, text, 8, step, timesteps) for step in (0, timesteps - 1))
            assert not torch.allclose(first, last, atol=1e-2)
        found = filled(lm, ids, timesteps=timesteps, attention_mask=is_text, **options)
        for row, pad in enumerate(PADS):
            assert torch.equal(found[row, pad:], recomputed(lm, ids[row, pad:], timesteps, **options))
            assert torch.equal(found[row, :pad], ids[row, :pad])
        assert not (found[is_text] == MASK_TOKEN_ID).any()
        was_masked = (ids == MASK_TOKEN_ID) & is_text
        assert not torch.isin(found[was_masked], torch.tensor(options.get("suppress_tokens", ()))).any()

    @BLOCK_CAUSAL
    def test_a_threshold_takes_fewer_passes_and_rows_that_are_full_are_not_run(
        self, load: Any, prompts: tuple[Tensor, Tensor], layout: Layout
    ) -> None:
        lm, ids = load(layout), prompts[0][[0, 3]]
        ids[0, 11:] = 9
        how: dict[str, Any] = {"timesteps": 17}
        slow, fast = (passes(lm, ids, **how, **more) for more in ({}, {"threshold": 0.1}))
        assert len(fast) < len(slow)
        assert fast[0][0] == 2
        assert fast[-1][0] == 1
        alone = [filled(lm, ids[row : row + 1], threshold=0.1, **how) for row in (0, 1)]
        assert torch.equal(filled(lm, ids, threshold=0.1, **how), torch.cat(alone))

    @BLOCK_CAUSAL
    @pytest.mark.parametrize("sampler", ["origin", "entropy", "low_confidence"])
    def test_the_batch_size_changes_nothing(
        self, load: Any, prompts: tuple[Tensor, Tensor], layout: Layout, sampler: str
    ) -> None:
        lm, (ids, is_text) = load(layout), prompts
        before = ids.clone()
        how: dict[str, Any] = {"timesteps": steps_of(lm, ids, is_text), "attention_mask": is_text, "sampler": sampler}
        how |= {"temperature": 0.8, "alg_temp": 0.3, "block_length": layout.block_length}
        together = generate(lm, ids, seed=3, **how)
        for size in (1, 3):
            assert torch.equal(generate(lm, ids, seed=3, batch_size=size, **how), together)
        assert not torch.equal(generate(lm, ids, seed=4, **how), together)
        assert torch.equal(ids, before)

    def test_a_streamed_model_and_one_of_transformers_write_the_same(
        self, folders: Any, load: Any, prompts: tuple[Tensor, Tensor]
    ) -> None:
        ids, folder = prompts[0][2:3, :8], str(folders(SDAR))
        how: dict[str, Any] = {"timesteps": 6, "block_length": 4, "sampler": "maskgit_plus"}
        ids = torch.nn.functional.pad(ids[:, :6].clamp(min=5), (0, 8), value=MASK_TOKEN_ID)
        expected = generate(load(SDAR), ids, **how)
        assert torch.equal(generate(load_streamed(folder), ids, **how), expected)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        written = model.generate(ids[:, :6], max_new_tokens=8, steps=6, alg="maskgit_plus", block_length=4)
        assert torch.equal(written, expected)


class TestCache:
    """States are those of the whole texts, and a pass computes what is asked for alone."""

    @BLOCK_CAUSAL
    def test_states_after_a_cache_are_those_of_the_whole_text(
        self, load: Any, prompts: tuple[Tensor, Tensor], layout: Layout
    ) -> None:
        model, size = load(layout).model, layout.block_length
        texts = prompts[0][:3].clamp(min=5)
        expected = model.hidden(texts)
        cache, ends = KeyValues(3), [0, 0, 0]
        for blocks in ((1, 2, 0), (1, 0, 3), (1, 1, 0)):  # other numbers of blocks in each row
            counts = [min(n * size, LENGTH - end) for n, end in zip(blocks, ends, strict=True)]
            columns = torch.tensor(ends)[:, None] + torch.arange(max(counts))
            ids = texts.gather(1, columns.clamp(max=LENGTH - 1))
            found = [model.hidden_of_block(ids, cache, counts, store) for store in (False, True)]
            assert torch.equal(*found)
            for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
                part = expected[row, end : end + count]
                torch.testing.assert_close(found[0][row, :count], part, rtol=0, atol=1e-4)
            ends = [end + count for end, count in zip(ends, counts, strict=True)]
            assert cache.filled == ends

    @BLOCK_CAUSAL
    def test_some_rows_go_on_without_the_others(
        self, load: Any, prompts: tuple[Tensor, Tensor], layout: Layout
    ) -> None:
        model, size = load(layout).model, layout.block_length
        texts, cache = prompts[0][:3].clamp(min=5), KeyValues(3)
        model.hidden_of_block(texts[:, : 3 * size], cache, [size, 3 * size, 0], store=True)
        cache.keep([2, 0])
        assert cache.filled == [0, size]
        found = model.hidden_of_block(torch.stack([texts[2, :size], texts[0, size : 2 * size]]), cache)
        expected = model.hidden(texts)
        torch.testing.assert_close(found[0], expected[2, :size], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[1], expected[0, size : 2 * size], rtol=0, atol=1e-4)

    @BLOCK_CAUSAL
    def test_a_step_computes_a_block(self, load: Any, layout: Layout) -> None:
        lm, size = load(layout), layout.block_length
        ids = torch.full((2, 6 * size), 7)
        ids[:, 3 * size + 2 :] = MASK_TOKEN_ID
        lengths = [length for _, length in passes(lm, ids, timesteps=3 * STEPS)]
        # The prompt's whole blocks at once; each block in its steps; the first two again when they are filled.
        assert lengths == [3 * size, *[size] * (STEPS + 1), *[size] * (STEPS + 1), *[size] * STEPS]

    def test_what_it_cannot_go_on_from_is_refused(self, load: Any) -> None:
        model, ids = load(SDAR).model, torch.full((2, 6), 7)
        with pytest.raises(ValueError, match="cache: found 3 rows, expected 2"):
            model.hidden_of_block(ids, KeyValues(3))
        with pytest.raises(ValueError, match=re.escape("counts: found 7, allowed are 0..6")):
            model.hidden_of_block(ids, KeyValues(2), [6, 7])
        cache = KeyValues(2)
        model.hidden_of_block(ids, cache, store=True)
        with pytest.raises(ValueError, match="cache: found a text of 6 tokens, allowed are whole blocks of 4 before"):
            model.hidden_of_block(ids, cache)
        with pytest.raises(ValueError, match="model: found 'Dream', allowed is one with block-causal attention"):
            load(DREAM).model.hidden_of_block(ids, KeyValues(2))


class TestEnd:
    """A row ends with the first end token that is written, as in the published loops, unless it isn't to."""

    def test_what_is_right_of_it_becomes_the_end_token(self, load: Any, prompts: tuple[Tensor, Tensor]) -> None:
        lm, ids = load(SDAR), prompts[0][[0, 3]]
        how: dict[str, Any] = {"timesteps": 5 * STEPS}
        whole = filled(lm, ids, **how)
        end = int(whole[0, 9])  # in the block of tokens 8 to 11
        first = 7 + whole[0, 7:].tolist().index(end)
        assert end not in whole[1]
        absent = next(token for token in range(5, VOCABULARY) if token not in whole)
        states: list[Tensor] = []
        how |= {"end_tokens": (absent, end)}
        found = filled(lm, ids, on_state=lambda _, rows, x: states.append(x.clone()), **how)
        assert torch.equal(found[0, :first], whole[0, :first])
        assert (found[0, first:] == end).all()
        assert torch.equal(found[1], whole[1])
        assert len(states) == 5 * STEPS
        assert torch.equal(filled(lm, ids[:1], **how), found[:1])
        assert passes(lm, ids, **how)[-1][0] == 1
        assert torch.equal(filled(lm, ids, stop_at_end=True, **how), found)
        assert torch.equal(filled(lm, ids, stop_at_end=False, **how), whole)
        assert not torch.isin(filled(lm, ids, suppress_end=True, **how)[ids == MASK_TOKEN_ID], end).any()

    def test_end_tokens_are_those_of_the_configuration_and_of_generation(self, load: Any) -> None:
        lm = replace(load(SDAR), carried={"generation_config.json": '{"eos_token_id": [9, 4]}'})
        assert lm.end_token_ids == (4, 9)
        lm = replace(lm, carried={"generation_config.json": '{"eos_token_id": "x"}'})
        with pytest.raises(ValueError, match="json: eos_token_id: found 'x', allowed is an id, or a list of ids"):
            lm.end_token_ids  # noqa: B018

    def test_only_block_by_block_a_row_stops_unasked(self, load: Any, prompts: tuple[Tensor, Tensor]) -> None:
        lm, ids = load(SDAR), prompts[0][[0, 3]]
        whole = filled(lm, ids, timesteps=10, block_length=0)
        end = int(whole[0, 9])
        assert torch.equal(filled(lm, ids, timesteps=10, block_length=0, end_tokens=end), whole)
        found = filled(lm, ids, timesteps=10, block_length=0, end_tokens=end, stop_at_end=True)
        assert (found[0, 9:] == end).all()


class TestRefused:
    """What it can't do is said before any work."""

    @pytest.mark.parametrize(
        ("layout", "given", "message"),
        [
            (SDAR, {"block_length": 8}, "block_length: found 8, allowed is 4, that of the model's attention"),
            (
                FAST_DLLM,
                {"timesteps": 1},
                "timesteps: found 1, allowed is at least 2, one for each block of 5 ",
            ),
            (
                SDAR,
                {"on_logits": lambda *_: None},
                "on_logits: found a hook, allowed is None with a block-causal",
            ),
            (
                SDAR,
                {"on_tokens": lambda *_: None},
                "on_tokens: found a hook, allowed is None with a block-causal",
            ),
        ],
        ids=["another length", "too few timesteps", "on_logits", "on_tokens"],
    )
    def test_an_argument(self, load: Any, layout: Layout, given: dict[str, Any], message: str) -> None:
        ids = torch.full((1, 10), MASK_TOKEN_ID)
        how = {"timesteps": 6, "block_length": layout.block_length} | given
        with pytest.raises(ValueError, match=re.escape(message)):
            generate(load(layout), ids, **how)

    def test_an_unknown_id(self, load: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(f"ids: found {VOCABULARY}, allowed are 0..{VOCABULARY - 1}")):
            generate(load(SDAR), torch.full((1, 4), VOCABULARY), timesteps=1, block_length=4)

    @BLOCK_CAUSAL
    def test_its_own_blocks_are_filled_unless_all_together_is_asked_for(self, load: Any, layout: Layout) -> None:
        lm, ids = load(layout), torch.full((1, 2 * layout.block_length), MASK_TOKEN_ID)
        states: dict[int | None, list[Tensor]] = {None: [], 0: []}
        for length, seen in states.items():
            keep = seen.append
            filled = generate(lm, ids, timesteps=4, block_length=length, on_state=lambda t, r, x, k=keep: k(x.clone()))
            assert not (filled == MASK_TOKEN_ID).any()
        half = states[None][2] != MASK_TOKEN_ID  # after two of four steps the first of two blocks is full
        assert half[0].tolist() == [True] * layout.block_length + [False] * layout.block_length
        assert torch.equal(
            generate(lm, ids, timesteps=4), generate(lm, ids, timesteps=4, block_length=layout.block_length)
        )
        hook = {"on_tokens": lambda _timestep, x, _logits: x}
        assert generate(lm, ids, timesteps=1, block_length=0, **hook).shape == ids.shape
