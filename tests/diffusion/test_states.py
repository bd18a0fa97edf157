"""Calibration states: drawn on the schedule, kept with their token states, and handed layer by layer to a consumer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import Calibration, ThermoConfig, calibrate, generate, quantize
from thermo_lib.data import corpus
from thermo_lib.data.puzzles import ANSWER, SUDOKU, TASK_LENGTH, held_out
from thermo_lib.diffusion import states as states_module
from thermo_lib.diffusion.inputs import run_states, shared_inputs
from thermo_lib.diffusion.states import States, calibration_batches, forward_states, trajectory_states
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.model import linear_names

RandomIds = Callable[..., Tensor]


def states(rows: int = 2, length: int = 3, timestep: int = 0) -> States:
    """States without content."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    return States(ids, ids == 0, torch.full((rows,), timestep), ids)


def same(a: Calibration, b: Calibration) -> bool:
    """Whether two calibrations hold the same states."""
    return (a.timesteps, a.source, len(a.parts)) == (b.timesteps, b.source, len(b.parts)) and all(
        torch.equal(x, y) and x.dtype == y.dtype
        for left, right in zip(a.parts, b.parts, strict=True)
        for x, y in zip(vars(left).values(), vars(right).values(), strict=True)
    )


class TestStates:
    """States of both sources: what is visible is the text, what is masked grows with the mask ratio."""

    def test_forward_states_are_the_text_under_each_timestep_s_mask(self, random_ids: RandomIds) -> None:
        ids = random_ids(50, 40)
        allowed = torch.arange(40).expand(50, -1) >= 10
        found = forward_states(ids, allowed, 4, 0, seed=0)
        assert found.timestep.tolist() == [t for t in range(4) for _ in range(50)]
        assert torch.equal(found.clean, ids.repeat(4, 1))
        assert torch.equal(torch.where(found.is_masked, 0, found.clean), found.ids)
        assert not found.is_masked[:, :10].any()
        for timestep in range(4):
            share = found.is_masked[found.timestep == timestep][:, 10:].double().mean()
            # Five standard deviations of a share of 1500 tokens: at most 5 * 0.5 / sqrt(1500) = 0.065.
            assert abs(share - (1 - timestep / 4)) < 0.065

    def test_trajectory_states_lead_from_all_masks_to_the_text(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        ids = random_ids(3, 12)
        allowed = torch.arange(12).expand(3, -1) >= 4
        found = trajectory_states(tiny, ids, allowed, 5, seed=2, batch_size=2)
        by_step = found.ids.view(5, 3, 12)
        assert torch.equal(by_step[0], torch.where(allowed, tiny.mask_token_id, ids))
        assert torch.equal(found.is_masked, found.ids == tiny.mask_token_id)
        final = found.clean[:3]
        assert not (final == tiny.mask_token_id).any()
        assert torch.equal(found.clean, final.repeat(5, 1))
        for earlier, later in zip(by_step, [*by_step[1:], final], strict=True):
            was_filled = earlier != tiny.mask_token_id
            assert torch.equal(earlier[was_filled], later[was_filled])
        start = by_step[0]
        expected = generate(tiny, start, timesteps=5, sampler="origin", temperature=1.0, seed=2)
        assert torch.equal(final, expected)

    def test_batches_stay_inside_a_timestep_and_cover_every_state_once(self) -> None:
        ids = torch.zeros(7, 2, dtype=torch.long)
        mixed = States(ids, ids == 0, torch.tensor([1, 0, 1, 1, 2, 0, 1]), ids)
        batches = [(timestep, rows.tolist()) for timestep, rows in mixed.batches(3)]
        assert batches == [(0, [1, 5]), (1, [0, 2, 3]), (1, [6]), (2, [4])]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"ids": torch.zeros(0, 3)}, r"found states of shape \(0, 3\), allowed is at least one state"),
            ({"ids": torch.zeros(3)}, r"found states of shape \(3,\)"),
            ({"is_masked": torch.zeros(2, 4)}, r"is_masked: found shape \(2, 4\), expected \(2, 3\)"),
            ({"clean": torch.zeros(1, 3)}, r"clean: found shape \(1, 3\), expected \(2, 3\)"),
            ({"timestep": torch.zeros(3)}, r"timestep: found shape \(3,\), expected \(2,\)"),
        ],
    )
    def test_states_that_do_not_fit_together_are_refused(self, changes: dict[str, Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            States(**{**vars(states()), **changes})


class TestCalibrate:
    """Drawing states for a model."""

    def test_equal_seeds_give_equal_states(self, tiny: DiffusionLM, random_ids: RandomIds) -> None:
        batches = [(random_ids(3, 8), None), (random_ids(2, 6), torch.arange(6).expand(2, -1) >= 3)]
        for source in ("forward", "trajectory"):
            first, again, other = (
                calibrate(tiny, batches, timesteps=4, source=source, seed=seed, progress=False) for seed in (1, 1, 2)
            )
            assert len(first) == 4 * (3 + 2)
            assert same(first, again)
            assert not same(first, other)

    def test_its_text_is_training_code_and_training_puzzles_of_both_tasks(
        self, tiny: DiffusionLM, small_corpus: None
    ) -> None:
        batches = calibration_batches(tiny, sequences=2, puzzles=3, length=24)
        code, puzzles = calibrate(tiny, batches, timesteps=2, source="forward", progress=False).parts
        assert code.ids.shape == (2 * 2, 24)
        assert puzzles.ids.shape == (2 * 6, TASK_LENGTH)
        train = "".join(corpus.load_corpus("train").values())
        assert "train_0" in train
        assert all(tiny.tokenizer.decode(row.tolist()) in train for row in code.clean)
        prompts = [tiny.tokenizer.decode(r.tolist(), skip_special_tokens=False) for r in puzzles.clean[:6]]
        inputs = [text.split(ANSWER)[0] for text in prompts]
        assert [text.startswith(SUDOKU) for text in inputs] == [True] * 3 + [False] * 3
        assert not any(held_out(text.split("|>")[1]) for text in inputs)

    def test_its_text_is_the_default(
        self, tiny: DiffusionLM, small_corpus: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seeds: list[int] = []

        def few(lm: DiffusionLM, seed: int) -> list[tuple[Tensor, Tensor | None]]:
            seeds.append(seed)
            return calibration_batches(lm, seed, sequences=2, puzzles=3, length=24)

        monkeypatch.setattr(states_module, "calibration_batches", few)
        how = {"timesteps": 2, "source": "forward", "seed": 5, "progress": False}
        assert same(calibrate(tiny, **how), calibrate(tiny, few(tiny, 5), **how))
        assert seeds == [5, 5]
        one, other = (calibration_batches(tiny, seed, sequences=2, puzzles=3, length=24) for seed in (5, 6))
        assert all(not a[0].equal(b[0]) for a, b in zip(one, other, strict=True))

    def test_a_model_that_does_not_know_the_tasks_is_calibrated_on_code_only(
        self, tiny: DiffusionLM, small_corpus: None
    ) -> None:
        foreign = replace(tiny, tokenizer=Tokenizer.from_str(tiny.tokenizer.to_str().replace(SUDOKU, "<|other|>")))
        batches = calibration_batches(foreign, sequences=2, length=12)
        (code,) = calibrate(foreign, batches, timesteps=2, source="forward", progress=False).parts
        assert code.ids.shape == (2 * 2, 12)

    @pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 5, dtype=torch.long), None)]])
    def test_an_empty_set_is_refused(self, tiny: DiffusionLM, batches: list[tuple[Tensor, None]]) -> None:
        with pytest.raises(ValueError, match="calibration: found an empty calibration set"):
            calibrate(tiny, batches, timesteps=2, source="forward", seed=0)

    def test_an_unknown_source_is_named(self, tiny: DiffusionLM) -> None:
        with pytest.raises(ValueError, match=r"calibration\.source: found 'noise', allowed are forward, trajectory"):
            calibrate(tiny, [(torch.ones(1, 2, dtype=torch.long), None)], source="noise")

    def test_no_timestep_is_refused(self, tiny: DiffusionLM) -> None:
        for source in ("forward", "trajectory"):
            with pytest.raises(ValueError, match="timesteps: found 0"):
                calibrate(tiny, [(torch.ones(1, 2, dtype=torch.long), None)], timesteps=0, source=source)


class TestCalibration:
    """A calibration is checked when made, and read back as it was written."""

    def test_reading_a_written_file_gives_the_states(self, calibration: Calibration, tmp_path: Path) -> None:
        several = Calibration((*calibration.parts, states(2, 5, 1)), calibration.timesteps, "forward")
        for number, one in enumerate((calibration, several)):
            path = tmp_path / "made on the way" / f"{number}.safetensors"
            one.save(path)
            assert same(Calibration.load(path), one)
            assert [p.name for p in path.parent.glob("*.tmp")] == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (((), 4, "forward"), "calibration: found no states"),
            (((states(),), 4, "noise"), r"calibration\.source: found 'noise'"),
            (((states(timestep=4),), 4, "forward"), r"timestep: found 4\.\.4, allowed are 0\.\.3"),
            (((states(timestep=-1),), 4, "forward"), r"timestep: found -1\.\.-1"),
        ],
    )
    def test_impossible_states_are_refused(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Calibration(*arguments)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"calibration: found no file .*absent\.safetensors"):
            Calibration.load(tmp_path / "absent.safetensors")

    def test_equal_states_are_equal_files(self, calibration: Calibration, tmp_path: Path) -> None:
        for name in ("a", "b", "c", "d"):
            calibration.save(tmp_path / name)
        assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c", "d")}) == 1

    @pytest.mark.parametrize(
        "damage",
        ["truncated", "missing tensor", "missing metadata", "not safetensors", "no JSON", "a list", "no steps"],
    )
    def test_a_damaged_file_is_named(self, calibration: Calibration, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "states.safetensors"
        calibration.save(path)
        tensors = load_file(path)
        metadata = {"calibration": '{"timesteps": 6, "source": "forward"}'}
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-8])
        elif damage == "missing tensor":
            del tensors["0.clean"]
            save_file(tensors, path, metadata)
        elif damage == "missing metadata":
            save_file(tensors, path)
        elif damage in ("no JSON", "a list", "no steps"):
            about = {"no JSON": "{", "a list": "[]", "no steps": '{"timesteps": "6", "source": "forward"}'}
            save_file(tensors, path, {"calibration": about[damage]})
        else:
            path.write_text("text", encoding="utf-8")
        with pytest.raises(ValueError, match=r"states\.safetensors: not a complete calibration file"):
            Calibration.load(path)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"0.ids": torch.zeros(2, 5)}, r"ids: found torch\.float32, allowed is torch\.int64"),
            ({"0.clean": torch.full((2, 5), torch.nan)}, r"clean: found torch\.float32, allowed is torch\.int64"),
            (
                {"0.is_masked": torch.zeros(2, 5, dtype=torch.uint8)},
                r"is_masked: found torch\.uint8, allowed",
            ),
            (
                {"0.timestep": torch.zeros(2, dtype=torch.float16)},
                r"timestep: found torch\.float16, allowed",
            ),
            ({"0.timestep": torch.zeros(3, dtype=torch.int32)}, r"timestep: found shape \(3,\), expected \(2,\)"),
            ({"0.timestep": torch.full((2,), 6)}, r"timestep: found 6\.\.6, allowed are 0\.\.5"),
            ({"0.clean": torch.zeros(2, 4, dtype=torch.int32)}, r"clean: found shape \(2, 4\), expected \(2, 5\)"),
            (
                {"0.ids": torch.zeros(5, dtype=torch.int32)},
                r"found states of shape \(5,\), allowed is",
            ),
            ({"0.ids": torch.full((2, 5), -1)}, r"ids: found -1, allowed are ids of tokens, 0 or above"),
            ({"0.clean": None}, r"0\.clean: found none, allowed is one"),
            ({"1.ids": torch.zeros(2, 5, dtype=torch.int32)}, r"1\.clean: found none, allowed is one"),
            ({"0.more": torch.zeros(2)}, r"0\.more: found one, allowed is none"),
            ({name: None for name in ("0.ids", "0.is_masked", "0.timestep", "0.clean")}, "found no states"),
        ],
    )
    def test_a_wrong_field_is_named(self, tmp_path: Path, changes: dict[str, Tensor | None], said: str) -> None:
        path = tmp_path / "states.safetensors"
        Calibration((states(2, 5),), 6, "forward").save(path)
        tensors = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
        save_file(tensors, path, {"calibration": '{"timesteps": 6, "source": "forward"}'})
        with pytest.raises(ValueError, match=rf"^.*states\.safetensors: not a complete calibration file: .*{said}.*$"):
            Calibration.load(path)

    @pytest.mark.parametrize("name", ["ids", "clean"])
    def test_ids_that_a_model_does_not_have_are_refused_before_it_runs(self, tiny: DiffusionLM, name: str) -> None:
        size = tiny.model.config.vocab_size
        of_another = replace(states(), **{name: torch.full_like(states().ids, size)})
        for call in (
            partial(run_states, tiny, names=[], consume=print),
            partial(quantize, tiny, ThermoConfig(quantizer="gptq")),
        ):
            said = rf"calibration: {name}: found id {size} in part 0, allowed are 0\.\.{size - 1}, the model's"
            with pytest.raises(ValueError, match=said):
                call(calibration=Calibration((of_another,), 4, "forward"))


class TestInputs:
    """What the linear layers see while the model runs over the states."""

    def test_linears_that_read_one_tensor_are_found_together(self, tiny: DiffusionLM) -> None:
        attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
        expected = [
            [prefix.format(block) + name for name in names]
            for block in range(2)
            for prefix, names in (
                (attention, ["q_proj", "k_proj", "v_proj"]),
                (attention, ["o_proj"]),
                (mlp, ["gate_proj", "up_proj"]),
                (mlp, ["down_proj"]),
            )
        ]
        assert shared_inputs(tiny, linear_names(tiny.model)) == expected

    def test_the_consumer_gets_every_input_with_its_token_state(
        self, tiny: DiffusionLM, calibration: Calibration
    ) -> None:
        name = "model.layers.0.self_attn.q_proj"
        seen: list[tuple[Tensor, Tensor, int]] = []
        run_states(tiny, calibration, [name], lambda n, x, m, t: seen.append((x.clone(), m.clone(), t)), batch_size=4)
        assert [timestep for _, _, timestep in seen] == [t for t in range(6) for _ in range(2)]
        (part,) = calibration.parts
        assert torch.equal(torch.cat([m for _, m, _ in seen]), part.is_masked.flatten())
        # The first linear reads the normed embeddings.
        block = tiny.model.model.layers[0]
        expected = block.input_layernorm(tiny.model.model.embed_tokens(part.ids)).flatten(0, 1)
        torch.testing.assert_close(torch.cat([x for x, _, _ in seen]), expected)

    def test_no_hook_stays_behind(self, tiny: DiffusionLM, calibration: Calibration) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("consumer failed")

        name = "model.layers.1.mlp.down_proj"
        with pytest.raises(RuntimeError, match="consumer failed"):
            run_states(tiny, calibration, [name], fail)
        assert not tiny.model.get_submodule(name)._forward_pre_hooks
