"""A row of a batch gets the text that it gets alone, whatever rows are beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from table_model import CONFIDENCE_SAMPLERS, MASK, RandomIds, TableLM
from torch import Tensor, nn

from thermo_lib import Calibration, ThermoConfig, generate, quantize
from thermo_lib.diffusion.schedule import Schedule
from thermo_lib.diffusion.tokens import SAMPLERS
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.quant.calls import CALL

TIMESTEPS = 6
KNOWN, MASKS = (6, 3, 5, 1), (13, 4, 8, 1)
HOW = {
    "one block": {"timesteps": 5},
    "blocks": {"timesteps": 5, "block_length": 4},
    "one step a block": {"timesteps": 4, "block_length": 4},
    "a threshold": {"timesteps": 9, "block_length": 4, "threshold": 0.3},
}
KINDS = ("full", "ranges", "weights")
EVERY_STEP = {"timesteps": TIMESTEPS, "num_time_groups": TIMESTEPS, "enable_boundary_smoothing": False}


@pytest.fixture(scope="module")
def models(tiny: DiffusionLM, calibration: Calibration) -> dict[str, DiffusionLM]:
    """In full precision, with ranges or with weights for every timestep."""
    few = {"bit_width": 4, "group_size": 16, "quantizer": "rtn"}
    ranges = {"activation_bits": 4, "activations.by_token_state": True}
    return {
        "full": tiny,
        "ranges": quantize(tiny, ThermoConfig(**few, **ranges, **EVERY_STEP), calibration),
        "weights": quantize(tiny, ThermoConfig(**few | {"quantizer": "gptq"}, **EVERY_STEP), calibration),
    }


@pytest.fixture(scope="module")
def rows(random_ids: RandomIds) -> list[Tensor]:
    """Prompts of several lengths with several numbers of masks after them; in one there are masks between, too."""
    found = [
        torch.cat([random_ids(1, known, seed=known), torch.full((1, masks), MASK)], dim=1)
        for known, masks in zip(KNOWN, MASKS, strict=True)
    ]
    found[0][0, [1, 3]] = MASK
    return found


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(row.shape[1] for row in rows)
    batch = torch.cat([nn.functional.pad(row, (longest - row.shape[1], 0), value=MASK) for row in rows])
    return batch, torch.arange(longest) >= longest - torch.tensor([row.shape[1] for row in rows])[:, None]


def cases() -> list[Any]:
    """Every sampler in every way, the kinds of models in turn; a threshold is for one sampler, with every kind."""
    found = [
        (sampler, KINDS[(i + j) % len(KINDS)], how)
        for i, how in enumerate(name for name in HOW if name != "a threshold")
        for j, sampler in enumerate(CONFIDENCE_SAMPLERS)
    ]
    found += [("maskgit_plus", kind, "a threshold") for kind in KINDS]
    return [pytest.param(sampler, kind, HOW[how], id=f"{sampler}-{kind}-{how}") for sampler, kind, how in found]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "kind", "how"), cases())
def test_beside_rows_of_other_lengths(
    models: dict[str, DiffusionLM], rows: list[Tensor], sampler: str, kind: str, how: dict[str, object]
) -> None:
    how = {"sampler": sampler, **how}
    batch, is_text = padded(rows)
    alone = [generate(models[kind], row, **how)[0] for row in rows]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        text = generate(models[kind], batch[order], attention_mask=is_text[order], **how)
        for place, number in enumerate(order):
            assert torch.equal(text[place, -rows[number].shape[1] :], alone[number])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", CONFIDENCE_SAMPLERS)
def test_a_row_of_4_masks_beside_one_of_12(
    models: dict[str, DiffusionLM], random_ids: RandomIds, sampler: str, kind: str
) -> None:
    ids = random_ids(2, 12)
    ids[0], ids[1, 8:] = MASK, MASK
    how = {"timesteps": 6, "block_length": 4, "sampler": sampler}
    text = generate(models[kind], ids, **how)
    for row in (0, 1):
        assert torch.equal(text[row : row + 1], generate(models[kind], ids[row : row + 1], **how))


def test_the_timesteps_matter(models: dict[str, DiffusionLM], rows: list[Tensor]) -> None:
    """The tests above would pass if layers had one range: here they haven't."""
    for kind in ("ranges", "weights"):
        lm, ids = models[kind], rows[0]
        is_masked = ids == MASK
        lm.set_timestep(0, TIMESTEPS)
        first = lm.logits(ids, is_masked)
        lm.set_timestep(TIMESTEPS - 1, TIMESTEPS)
        assert not torch.allclose(first, lm.logits(ids, is_masked), atol=0.1)


@pytest.mark.parametrize(
    ("sampler", "temperature", "alg_temp", "block_length"),
    [
        (sampler, *temperatures, (None, 4)[(i + j) % 2])
        for i, sampler in enumerate(SAMPLERS)
        for j, temperatures in enumerate([(0.0, 0.5), (1.0, 0.0), (1.0, 0.5)])
    ],
)
def test_random_numbers_of_a_padded_row_are_those_it_has_alone(
    tiny: DiffusionLM, rows: list[Tensor], sampler: str, temperature: float, alg_temp: float, block_length: int | None
) -> None:
    how = {"timesteps": 5, "sampler": sampler, "temperature": temperature, "alg_temp": alg_temp}
    how["block_length"] = block_length
    for order in ([0, 1, 2, 3], [1, 3, 0, 2]):
        batch, is_text = padded([rows[number] for number in order])
        text = generate(tiny, batch, attention_mask=is_text, seed=3, batch_size=3, **how)
        for place, number in enumerate(order):
            alone = generate(tiny, rows[number], seed=3 + 1_000_003 * place, **how)
            assert torch.equal(text[place, -rows[number].shape[1] :], alone[0])


def test_equal_prompts_in_a_padded_batch_get_different_texts(tiny: DiffusionLM, rows: list[Tensor]) -> None:
    batch, is_text = padded([rows[0], rows[1], rows[1]])
    text = generate(tiny, batch, attention_mask=is_text, timesteps=4, temperature=1.0)
    assert not torch.equal(text[1], text[2])


class Spy(TableLM):
    """Notes the timesteps that the rows of each pass are told."""

    def __init__(self, table: Tensor):
        super().__init__(table)
        self.step, self.told = (0, 1), []

    def set_timestep(self, timestep: int, timesteps: int) -> None:
        self.step = timestep, timesteps

    def logits(self, ids: Tensor, at: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        timesteps = [self.step[0]] * len(ids) if CALL.rows is None else CALL.rows[0].tolist()
        self.told.append((timesteps, self.step[1] if CALL.rows is None else CALL.rows[1]))
        return super().logits(ids, at)


class TestTold:
    """Time-aware layers are told the timestep of the run, or with several blocks that of a row's mask ratio."""

    @pytest.fixture
    def spy(self) -> Spy:
        return Spy(torch.randn(12, 9, generator=torch.Generator().manual_seed(0)))

    def test_of_a_single_block_the_timestep(self, spy: Spy) -> None:
        ids = torch.full((2, 12), MASK)
        ids[1, 5:] = 3
        generate(spy, ids, timesteps=6)
        assert spy.told == [([i, i], 6) for i in range(6)]

    def test_of_several_that_of_the_share_that_is_still_masked(self, spy: Spy) -> None:
        ids = torch.full((2, 12), MASK)
        ids[1, 4:] = 3
        generate(spy, ids, timesteps=6, block_length=4, sampler="low_confidence")
        # The first row fills 2 of 12 at each step, the second, a single block, is told the timestep.
        assert spy.told == [([i, i], 6) for i in range(6)]
        spy.told.clear()
        ids[1, 4:6] = MASK
        generate(spy, ids, timesteps=6, block_length=4, sampler="low_confidence")
        # 6 masks are two blocks of three steps: of 4 it fills 2, 1 and 1, of 2 one at the first and second step.
        left = [6, 4, 3, 2, 1]
        assert spy.told[:5] == [([i, (6 - m) * 6 // 6], 6) for i, m in enumerate(left)]

    def test_with_a_threshold_it_is_always_the_share(self, spy: Spy) -> None:
        ids = torch.full((1, 12), MASK)
        generate(spy, ids, timesteps=24, sampler="maskgit_plus", threshold=1.0)
        assert spy.told == [([2 * i], 24) for i in range(12)]  # one position at each step, of 12

    def test_rows_with_equal_timesteps_are_told_once(self, spy: Spy) -> None:
        seen: list[bool] = []
        spy.logits, before = lambda *given: (seen.append(CALL.rows is None), before(*given))[1], spy.logits
        generate(spy, torch.full((3, 12), MASK), timesteps=6, block_length=4)
        assert seen == [True] * len(seen)


class TestSchedule:
    """Timesteps are shared out as evenly as they can be, to each row's blocks."""

    @pytest.mark.parametrize(
        ("masked", "block_length", "timesteps", "blocks"),
        [
            (12, 4, 6, [0, 0, 1, 1, 2, 2]),
            (12, 4, 8, [0, 0, 0, 1, 1, 1, 2, 2]),
            (13, 4, 7, [0, 0, 1, 1, 2, 2, 3]),
            (13, 4, 4, [0, 1, 2, 3]),
            (3, 4, 3, [0, 0, 0]),
            (0, 4, 2, [0, 0]),
            (5, None, 3, [0, 0, 0]),
        ],
    )
    def test_blocks_of_timesteps(
        self, masked: int, block_length: int | None, timesteps: int, blocks: list[int]
    ) -> None:
        schedule = Schedule.of(torch.arange(14)[None] < masked, block_length, timesteps)
        found = [[int(part) for part in schedule.at(timestep)] for timestep in range(timesteps)]
        assert [block for block, _, _ in found] == blocks
        steps = [blocks[:i].count(block) for i, block in enumerate(blocks)]
        assert [step for _, step, _ in found] == steps
        assert [count for _, _, count in found] == [blocks.count(block) for block in blocks]
        assert schedule.counts() == {blocks.count(block) for block in blocks}
        assert schedule.start(torch.tensor([blocks[-1] + 1])).item() == timesteps

    def test_too_few_timesteps_are_named(self) -> None:
        is_masked = torch.arange(14)[None] < torch.tensor([[3], [13]])
        with pytest.raises(
            ValueError, match="timesteps: found 3, allowed is at least 4, one for each block of 4 posit"
        ):
            Schedule.of(is_masked, 4, 3)


def test_a_table_with_ties_is_filled_alike_in_a_wider_batch(build_tiny: Callable[[int], DiffusionLM]) -> None:
    """Positions that are equally sure are filled from the left, with or without padding."""
    lm = build_tiny(0)
    lm.model.lm_head.weight.zero_()
    batch, is_text = padded([torch.full((1, 3), MASK), torch.full((1, 40), MASK)])
    states: list[Tensor] = []
    how = {"timesteps": 3, "eps": 0.0}
    generate(lm, batch, attention_mask=is_text, on_state=lambda _, rows, x: states.append(x[0, -3:].clone()), **how)
    assert [(x == MASK).tolist() for x in states] == [[True] * 3, [False, True, True], [False, False, True]]
