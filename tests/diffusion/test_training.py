"""Training: a run that is killed at any moment and goes on ends with the same weights as one that is not."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killed import ended_by
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from thermo_lib import load_model
from thermo_lib.data import corpus
from thermo_lib.data.corpus import token_stream, train_tokenizer
from thermo_lib.data.puzzles import ANSWER
from thermo_lib.diffusion.training import Training, export, learning_rate_factor, prepare, stratified_ratios
from thermo_lib.files.snapshots import digest

SETTINGS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "steps": 6,
    "cycles": 1,
    "decay_steps": 3,
    "warmup_steps": 2,
    "muon_lr": 0.02,
    "adamw_lr": 0.003,
    "weight_decay": 0.05,
    "code_batch": 3,
    "sudoku_batch": 2,
    "countdown_batch": 2,
    "checkpoint_every": 2,
    "sequence_length": 12,
    "task_length": 42,
}
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40))


def start_training(checkpoint: Path, **changes: Any) -> Training:
    """A run on a few lines of code, with a tokenizer and a stream that depend on nothing."""
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(iter([TEXT]), 280)
    stream = token_stream({"f.py": TEXT}, tokenizer)
    return Training({**SETTINGS, **changes}, 0, stream, tokenizer, checkpoint)


def be_killed_while_saving(checkpoint: Path, saves: int) -> None:
    """Train in this process, which dies of SIGKILL in the middle of the given save, its file half in place."""
    training = start_training(checkpoint)
    replace, done = os.replace, []

    def replace_or_die(*paths: object) -> None:
        done.append(paths)
        if len(done) == saves:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    training.run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A run that nothing interrupted."""
    training = start_training(tmp_path_factory.mktemp("whole") / "checkpoint.safetensors")
    training.run()
    return training


def same(a: Training, b: Training) -> bool:
    """Whether two runs have the same weights, losses and optimizer state, bit for bit."""
    left, right = a._state(), b._state()
    return a.step == b.step and left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


class TestResume:
    """What a run computes doesn't depend on interruptions."""

    @pytest.mark.slow
    @pytest.mark.parametrize("stops", [[2], [3], [1, 4, 5]])
    def test_a_resumed_run_ends_as_an_uninterrupted_one(
        self, whole: Training, tmp_path: Path, stops: list[int]
    ) -> None:
        for stop in stops:
            start_training(tmp_path / "c.safetensors").run(until=stop)
        resumed = start_training(tmp_path / "c.safetensors")
        assert resumed.step == stops[-1]
        resumed.run()
        assert same(resumed, whole)
        assert len(whole.losses) == 6

    @pytest.mark.slow
    def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(self, whole: Training, tmp_path: Path) -> None:
        # It saves after steps 2 and 4; killed in the second save it has done four steps and goes on from the second.
        checkpoint = tmp_path / "c.safetensors"
        assert ended_by(lambda: be_killed_while_saving(checkpoint, 2)) == signal.SIGKILL
        assert len(list(tmp_path.glob(".c.safetensors.*.tmp"))) == 1
        resumed = start_training(checkpoint)
        assert resumed.step == 2
        resumed.run()
        assert same(resumed, whole)

    def test_a_finished_run_does_nothing_more(self, whole: Training) -> None:
        again = start_training(whole.checkpoint)
        again.run()
        assert same(again, whole)

    @pytest.mark.parametrize(
        "changes", [{"code_batch": 4}, {"muon_lr": 0.5}, {"weight_decay": 0.5}, {"sequence_length": 13}]
    )
    def test_other_settings_than_the_checkpoint_s_are_refused(self, whole: Training, changes: dict[str, Any]) -> None:
        (name, value) = next(iter(changes.items()))
        with pytest.raises(ValueError, match="delete the checkpoint to start anew") as error:
            start_training(whole.checkpoint, **changes)
        assert f'"{name}": {SETTINGS[name]}' in str(error.value)
        assert f'"{name}": {value}' in str(error.value)

    def test_the_length_of_a_run_may_change_while_the_learning_rate_is_constant(
        self, whole: Training, tmp_path: Path
    ) -> None:
        start_training(tmp_path / "c.safetensors", steps=20, decay_steps=3).run(until=2)
        shortened = start_training(tmp_path / "c.safetensors")
        shortened.run()
        assert same(shortened, whole)

    def test_a_finished_run_may_be_followed_by_another_cycle(self, whole: Training, tmp_path: Path) -> None:
        checkpoint = tmp_path / "c.safetensors"
        shutil.copy(whole.checkpoint, checkpoint)
        longer = start_training(checkpoint, steps=12, cycles=2)
        assert longer.step == 6
        longer.run()
        uninterrupted = start_training(tmp_path / "d.safetensors", steps=12, cycles=2)
        uninterrupted.run()
        assert same(longer, uninterrupted)

    @pytest.mark.parametrize("changes", [{"warmup_steps": 1}, {"decay_steps": 4}, {"steps": 12}])
    def test_finished_steps_keep_their_learning_rates(self, whole: Training, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="delete the checkpoint to start anew"):
            start_training(whole.checkpoint, **changes)

    def test_steps_that_cycles_do_not_divide_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"train\.steps: found 6, expected a multiple of train\.cycles \(4\)"):
            start_training(tmp_path / "c.safetensors", cycles=4)

    def test_the_checkpoint_says_at_which_step_it_was_made(self, whole: Training) -> None:
        with safe_open(whole.checkpoint, framework="pt") as file:
            assert file.metadata()["step"] == "6"


def signed(change: Callable[[dict[str, Tensor]], object]) -> Callable[..., None]:
    """A change of a checkpoint whose digest is that of the changed content."""

    def changed(state: dict[str, Tensor], about: dict[str, str]) -> None:
        change(state)
        about["digest"] = digest(state)

    return changed


class TestDamaged:
    """A checkpoint that isn't what was written is refused in one line."""

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda state, about: state.pop("model.model.norm.weight"), "its content has changed"),
            (lambda state, about: about.pop("digest"), "its content has changed"),
            (lambda state, about: about.update(step="4"), "step: found '4', expected 6, the number of losses"),
            (lambda state, about: about.pop("step"), "step: found None, expected 6"),
            (signed(lambda state: state.pop("losses")), "step: found '6', expected 0"),
            (signed(lambda state: state.pop("adamw.0.exp_avg")), "missing tensors adamw.0.exp_avg"),
            (signed(lambda state: state["muon.0.momentum_buffer"].fill_(torch.nan)), "found NaN or infinity"),
            (signed(lambda state: state.update(more=torch.zeros(1))), "unexpected tensors more"),
            (signed(lambda state: state.update({"adamw.0.step": torch.zeros(2)})), "found shape (2,), expected ()"),
        ],
    )
    def test_whatever_is_wrong_is_said(
        self, whole: Training, tmp_path: Path, change: Callable[..., object], said: str
    ) -> None:
        path, state = tmp_path / "c.safetensors", load_file(whole.checkpoint)
        with safe_open(whole.checkpoint, framework="pt") as file:
            about = file.metadata()
        change(state, about)
        save_file(state, path, metadata=about)
        with pytest.raises(ValueError, match=r"^.*c\.safetensors: .*; delete the checkpoint to start anew$") as error:
            start_training(path)
        assert said in str(error.value)

    @pytest.mark.parametrize("content", [b"", b"half", bytes(2000)])
    def test_half_a_file_is_said(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "c.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.safetensors: not a complete checkpoint \(.*\); delete the"):
            start_training(tmp_path / "c.safetensors")


class TestSchedules:
    """Learning rates and mask ratios."""

    def test_the_learning_rate_warms_up_stays_and_falls(self) -> None:
        factors = [learning_rate_factor(step, 10, 4, 5) for step in range(10)]
        assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])

    def test_the_learning_rate_repeats_every_cycle(self) -> None:
        factors = [learning_rate_factor(step, 10, 4, 5) for step in range(30)]
        assert factors == factors[:10] * 3

    @given(steps=st.integers(1, 500), warmup=st.integers(1, 100), decay=st.integers(1, 300))
    def test_the_learning_rate_is_above_zero_at_most_one_and_has_one_peak(
        self, steps: int, warmup: int, decay: int
    ) -> None:
        factors = [learning_rate_factor(step, steps, warmup, decay) for step in range(steps)]
        assert all(0 < factor <= 1 for factor in factors)
        top = factors.index(max(factors))
        assert factors[:top] == sorted(factors[:top])
        assert factors[top:] == sorted(factors[top:], reverse=True)

    @given(count=st.integers(1, 100), seed=st.integers(0, 2**31))
    def test_there_is_one_mask_ratio_in_each_stratum(self, count: int, seed: int) -> None:
        ratios = stratified_ratios(count, torch.Generator().manual_seed(seed))
        assert ((ratios >= 0) & (ratios <= 1)).all()
        # Up to rounding at the edges of a stratum, the k-th smallest lies in [k/n, (k + 1)/n].
        position = ratios.sort().values * count - torch.arange(count)
        assert ((position > -1e-4) & (position < 1 + 1e-4)).all()

    def test_the_mask_ratios_come_in_random_order(self) -> None:
        ratios = stratified_ratios(50, torch.Generator().manual_seed(0))
        assert not torch.equal(ratios, ratios.sort().values)


class TestRun:
    """What a run learns, and what is left of it."""

    @pytest.mark.slow
    def test_the_loss_falls(self, tmp_path: Path) -> None:
        training = start_training(tmp_path / "c.safetensors", steps=40, decay_steps=10, code_batch=8)
        training.run()
        losses = torch.tensor(training.losses)
        assert (losses[-5:].mean(0) < losses[:5].mean(0) - 0.5).all()

    def test_no_two_steps_see_the_same_text(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        training = start_training(tmp_path / "c.safetensors")
        loss = training._loss
        seen: list[Tensor] = []

        def record(ids: Tensor, allowed: Tensor | None, generator: torch.Generator) -> Tensor:
            seen.append(ids)
            return loss(ids, allowed, generator)

        monkeypatch.setattr(training, "_loss", record)
        training.run()
        for batches in (seen[::2], seen[1::2]):  # code and planning
            assert len(batches) == 6
            assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 6

    def test_only_answers_of_puzzles_are_masked(self, whole: Training, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[Tensor, Tensor | None]] = []

        def record(ids: Tensor, allowed: Tensor | None, generator: torch.Generator) -> Tensor:
            seen.append((ids, allowed))
            return sum(parameter.sum() for parameter in training.model.parameters())

        training = start_training(whole.checkpoint, steps=12, cycles=2)
        monkeypatch.setattr(training, "_loss", record)
        training.run_step()
        (code, everywhere), (planning, answers) = seen
        assert code.shape == (3, 12)
        assert everywhere is None
        assert planning.shape == answers.shape == (4, 42)
        marker = training.tokenizer.token_to_id(ANSWER)
        assert torch.equal(answers, (planning == marker).cumsum(1).bool() & (planning != marker))

    def test_an_exported_model_is_the_trained_one_in_bfloat16(self, whole: Training, tmp_path: Path) -> None:
        record = export(whole, tmp_path / "reference", every=2)
        assert json.loads((tmp_path / "reference" / "training.json").read_text(encoding="utf-8")) == record
        loaded = load_model(str(tmp_path / "reference"))
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], weight.to(torch.bfloat16).float()), name
        assert loaded.mask_token_id == whole.mask_token_id
        assert record["parameters"] == sum(p.numel() for p in loaded.model.parameters())
        assert (record["steps"], record["code_tokens"], record["puzzles"]) == (6, 6 * 3 * 12, 6 * 4)
        assert record["settings"]["seed"] == 0
        assert record["code_loss"] == [
            pytest.approx((whole.losses[i][0] + whole.losses[i + 1][0]) / 2, abs=1e-4) for i in (0, 2, 4)
        ]
        assert len(record["planning_loss"]) == 3

    def test_a_run_shorter_than_a_point_of_the_curve_has_one_point(self, whole: Training, tmp_path: Path) -> None:
        record = export(whole, tmp_path / "reference", every=50)
        assert record["loss_every"] == 6
        assert record["code_loss"] == [pytest.approx(sum(code for code, _ in whole.losses) / 6, abs=1e-4)]

    def test_an_unfinished_run_is_not_exported(self, tmp_path: Path) -> None:
        training = start_training(tmp_path / "c.safetensors")
        training.run(until=2)
        with pytest.raises(ValueError, match="training: found 2 finished steps, expected 6"):
            export(training, tmp_path / "reference")
        assert not (tmp_path / "reference").exists()


class TestPrepare:
    """The training stream and the tokenizer are made once."""

    def test_the_second_call_reads_what_the_first_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_corpus: None
    ) -> None:
        stream, tokenizer = prepare(tmp_path / "run", {}, 270)
        files = corpus.load_corpus("train")
        assert stream.dtype == torch.int32
        assert torch.equal(stream, token_stream(files, tokenizer))
        monkeypatch.setattr(corpus, "load_corpus", lambda *_: pytest.fail("the corpus was read again"))
        again, same_tokenizer = prepare(tmp_path / "run", {}, 270)
        assert torch.equal(again, stream)
        assert isinstance(same_tokenizer, Tokenizer)
        assert same_tokenizer.to_str() == tokenizer.to_str()

    @pytest.mark.parametrize("name", ["stream.safetensors", "tokenizer.json"])
    @pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-9] + bytes(9)])
    def test_what_is_damaged_is_made_anew_with_a_line(
        self,
        tmp_path: Path,
        small_corpus: None,
        capsys: pytest.CaptureFixture[str],
        name: str,
        damage: Callable[[bytes], bytes],
    ) -> None:
        prepare(tmp_path, {}, 270)
        whole, path = (tmp_path / name).read_bytes(), tmp_path / name
        path.write_bytes(damage(whole))
        assert capsys.readouterr().err == ""
        prepare(tmp_path, {}, 270)
        assert path.read_bytes() == whole
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert said.endswith("; both are made anew\n")

    def test_a_stream_without_its_tokenizer_is_made_anew(self, tmp_path: Path, small_corpus: None) -> None:
        stream, _ = prepare(tmp_path, {}, 270)
        (tmp_path / "tokenizer.json").unlink()
        assert prepare(tmp_path, {}, 270)[0].equal(stream)
        assert (tmp_path / "tokenizer.json").is_file()

    def test_what_was_made_with_other_settings_is_not_taken(self, tmp_path: Path, small_corpus: None) -> None:
        prepare(tmp_path, {}, 270)
        with contextlib.suppress(ValueError):  # made again, or refused
            assert prepare(tmp_path, {}, 280)[1].get_vocab_size() == 280
