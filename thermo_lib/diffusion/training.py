"""Training of the reference model, resumable after a kill at any moment with the same final result.

The randomness of a step depends only on ``(seed, step)``, and a checkpoint holds weights and optimizer
state, so a run that was killed and goes on computes what an uninterrupted one would. Optimizer: Muon
(Jordan et al., 2024) for the matrices of the blocks, AdamW for the rest. The learning rates run through equal
cycles; in each they warm up, stay constant, and fall linearly to zero over the last ``decay_steps``, so that a
longer run goes on from a finished shorter one (WSD-S; Wen et al., arXiv 2410.05192). Loss: cross-entropy at the
masked positions, mask ratios stratified over the batch.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from thermo_lib.data import corpus
from thermo_lib.data.corpus import token_stream, train_tokenizer
from thermo_lib.data.puzzles import MASK, TASKS, encode_puzzles, make_puzzles, token_id
from thermo_lib.diffusion.sampling import mask_tokens
from thermo_lib.files.snapshots import digest
from thermo_lib.files.tensors import check_tensors
from thermo_lib.files.text import write_text
from thermo_lib.files.whole import replacing
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.models.lm import DiffusionLM, build_reference, save_model


def stratified_ratios(count: int, generator: torch.Generator) -> Tensor:
    """Mask ratios ``(count,)`` in (0, 1), one in each of ``count`` equal intervals, in random order."""
    offsets = torch.rand(count, generator=generator, dtype=torch.float32)
    ratios = (torch.arange(count) + offsets) / count
    return ratios[torch.randperm(count, generator=generator)]


def learning_rate_factor(step: int, cycle_steps: int, warmup_steps: int, decay_steps: int) -> float:
    """The warmup-stable-decay factor of one step, in (0, 1]; every ``cycle_steps`` it starts again."""
    position = step % cycle_steps
    return min(1.0, (position + 1) / warmup_steps, (cycle_steps - position) / decay_steps)


class Training:
    """One training run; ``step`` counts the finished optimizer steps.

    Args:
        params: the ``train`` and ``data`` sections of ``params.yaml``, merged.
        seed: seeds weights, batches and masks.
        stream: int32 ``(tokens,)``, the training code.
        tokenizer: the reference model's tokenizer.
        checkpoint: file of the resumable state; read if it exists.

    Raises:
        ValueError: ``steps`` isn't a whole number of steps for each of ``cycles``, or the checkpoint is damaged or of
            another run. A run may get another schedule as long as its finished steps have the same rates.
    """

    def __init__(self, params: Mapping[str, Any], seed: int, stream: Tensor, tokenizer: Tokenizer, checkpoint: Path):
        if params["steps"] % params["cycles"]:
            raise ValueError(
                f"train.steps: found {params['steps']}, expected a multiple of train.cycles ({params['cycles']})"
            )
        self.params, self.seed, self.stream = params, seed, stream
        self.tokenizer, self.checkpoint = tokenizer, checkpoint
        self.mask_token_id = token_id(tokenizer, MASK)
        self.model: MaskPredictor = build_reference(tokenizer.get_vocab_size(), self.mask_token_id, dict(params), seed)
        self.model.set_attn_implementation("eager")  # 1.2 times as fast as the fused kernel's backward on CPU
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers = {
            "muon": torch.optim.Muon(matrices, lr=params["muon_lr"], weight_decay=params["weight_decay"]),
            "adamw": torch.optim.AdamW(others, lr=params["adamw_lr"], betas=(0.9, 0.95), weight_decay=0.0),
        }
        self.step = 0
        self.losses: list[list[float]] = []  # per step: code, planning; nats per masked token
        if checkpoint.is_file():
            self._resume()

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                state |= {f"{name}.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        state["losses"] = torch.tensor(self.losses, dtype=torch.float64).reshape(-1, 2)
        return {k: v.contiguous().clone() for k, v in state.items()}

    def save(self) -> None:
        """Write the checkpoint; the earlier one stays whole until the new one is complete."""
        with replacing(self.checkpoint, "an earlier checkpoint is as it was") as new:
            state = self._state()
            about = {"step": str(self.step), "params": self._fingerprint(), "digest": digest(state)}
            save_file(state, new, metadata=about)

    def _factor(self, step: int) -> float:
        p = self.params
        return learning_rate_factor(step, p["steps"] // p["cycles"], p["warmup_steps"], p["decay_steps"])

    def _fingerprint(self) -> str:
        """All that the finished steps depend on; of the schedule, their learning rates."""
        schedule = ("steps", "cycles", "warmup_steps", "decay_steps", "checkpoint_every")
        fixed = {k: v for k, v in self.params.items() if k not in schedule}
        rates = json.dumps([self._factor(step) for step in range(self.step)])
        digest = hashlib.sha256(rates.encode()).hexdigest()[:16]
        return json.dumps({"seed": self.seed, "rates": digest, **fixed}, sort_keys=True)

    def _read(self) -> tuple[str, dict[str, Tensor]]:
        """The settings of the checkpoint and its state; raises ValueError where it isn't what ``save`` wrote."""
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                about = file.metadata() or {}
                state = {k: file.get_tensor(k) for k in file.keys()}
            if about.get("digest") != digest(state):
                raise ValueError("its content has changed since it was written")
            done = len(state.get("losses", ()))
            if not done or about.get("step") != str(done):
                raise ValueError(f"step: found {about.get('step')!r:.80}, expected {done}, the number of losses")
            check_tensors(state, self._expected(done), self.checkpoint)
        except (SafetensorError, OSError, ValueError) as error:
            problem = f"{self.checkpoint}: not a complete checkpoint ({error})"
            raise ValueError(f"{problem}; delete the checkpoint to start anew") from error
        self.step = done
        return about.get("params", ""), state

    def _expected(self, steps: int) -> dict[str, Tensor]:
        """What ``_state`` is like after so many steps."""
        expected = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for owner, slots in {"muon": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"]}.items():
            trained = [p for group in self.optimizers[owner].param_groups for p in group["params"]]
            for index, parameter in enumerate(trained):
                expected |= {f"{owner}.{index}.{slot}": parameter for slot in slots}
                if owner == "adamw":
                    expected[f"{owner}.{index}.step"] = torch.empty(())
        return expected | {"losses": torch.empty(steps, 2)}

    def _resume(self) -> None:
        params, state = self._read()
        if params != self._fingerprint():
            raise ValueError(
                f"{self.checkpoint}: found a checkpoint of {params}, "
                f"this run is {self._fingerprint()}; delete the checkpoint to start anew"
            )
        self.losses = state.pop("losses").tolist()
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        for name, optimizer in self.optimizers.items():
            restored: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                owner, _, rest = key.partition(".")
                if owner == name:
                    index, _, slot = rest.partition(".")
                    restored.setdefault(int(index), {})[slot] = value
            optimizer.load_state_dict({"state": restored, "param_groups": optimizer.state_dict()["param_groups"]})

    def _loss(self, ids: Tensor, allowed: Tensor | None, generator: torch.Generator) -> Tensor:
        masked, is_masked = mask_tokens(
            ids, stratified_ratios(len(ids), generator), self.mask_token_id, generator, allowed
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model.predict(self.model.hidden(masked)[is_masked])
        return F.cross_entropy(logits.float(), ids[is_masked])

    def run_step(self) -> None:
        """One optimizer step on a batch of code and a batch of planning tasks."""
        p = self.params
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        length = p["sequence_length"]
        starts = torch.randint(len(self.stream) - length, (p["code_batch"],), generator=generator)
        code = torch.stack([self.stream[s : s + length] for s in starts.tolist()]).long()
        puzzles = [
            puzzle
            for task in TASKS
            for puzzle in make_puzzles(task, p[f"{task}_batch"], (self.seed, self.step), test=False)
        ]
        planning, is_answer = encode_puzzles(puzzles, self.tokenizer, p["task_length"])

        factor = self._factor(self.step)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = p[f"{name}_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
        losses = [self._loss(code, None, generator), self._loss(planning, is_answer, generator)]
        (losses[0] + losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.losses.append([loss.item() for loss in losses])
        self.step += 1

    def run(self, until: int | None = None) -> MaskPredictor:
        """Train up to step ``until`` (default: to the end), saving every ``checkpoint_every`` steps."""
        end = self.params["steps"] if until is None else until
        self.model.train()
        with tqdm(total=end, initial=self.step, desc="training", unit="step", mininterval=1) as bar:
            while self.step < end:
                self.run_step()
                bar.update()
                if self.step % self.params["checkpoint_every"] == 0 or self.step == end:
                    self.save()
                    recent = torch.tensor(self.losses[-100:], dtype=torch.float32).mean(0).tolist()
                    bar.set_postfix(code=f"{recent[0]:.3f}", planning=f"{recent[1]:.3f}")
        return self.model.eval()


def prepare(workdir: Path, packages: Mapping[str, str], vocab_size: int) -> tuple[Tensor, Tokenizer]:
    """The training stream and the tokenizer, made once and kept in ``workdir`` for a run that goes on.

    Where they aren't what was written they are made anew, and a line on stderr says so.

    Args:
        workdir: folder of the run.
        packages, vocab_size: see ``data``.
    """
    stream_file, tokenizer_file = workdir / "stream.safetensors", workdir / "tokenizer.json"
    made_of = json.dumps([sorted(packages.items()), vocab_size])
    if stream_file.is_file():
        try:
            with safe_open(stream_file, framework="pt") as file:
                about, stream = (file.metadata() or {}).get("data", ""), file.get_tensor("stream")
            text = tokenizer_file.read_text(encoding="utf-8")
            found, _, seal = about.rpartition("|")
            if seal != digest({"stream": stream}, text):
                raise ValueError("its content has changed since it was written")
            if found == made_of:
                return stream, Tokenizer.from_str(text)
        except (SafetensorError, OSError, ValueError) as error:
            print(f"{stream_file} or {tokenizer_file.name}: {error}; both are made anew", file=sys.stderr)
    files = corpus.load_corpus("train", packages)
    tokenizer = train_tokenizer(iter(files.values()), vocab_size)
    text, stream = tokenizer.to_str(pretty=True), token_stream(files, tokenizer)
    write_text(tokenizer_file, text)
    with replacing(stream_file) as new:
        save_file({"stream": stream}, new, metadata={"data": f"{made_of}|{digest({'stream': stream}, text)}"})
    return stream, tokenizer


def export(training: Training, folder: Path, every: int = 50) -> dict[str, Any]:
    """Write the finished model (bfloat16) with the record of its training, ``training.json``; a ``README.md`` stays.

    Args:
        training: a run that has reached its last step.
        folder: where ``load_model`` will find it.
        every: steps that one point of the loss curves averages; a shorter run has one point.

    Returns:
        The record: parameters, steps, tokens seen and loss curves.

    Raises:
        ValueError: the run isn't finished.
    """
    p = training.params
    if training.step < p["steps"]:
        raise ValueError(f"training: found {training.step} finished steps, expected {p['steps']}")
    losses = torch.tensor(training.losses, dtype=torch.float32)
    every = min(every, len(losses))
    points = losses[: len(losses) // every * every].view(-1, every, 2).mean(1)
    record = {
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "steps": training.step,
        "code_tokens": training.step * p["code_batch"] * p["sequence_length"],
        "puzzles": training.step * (p["sudoku_batch"] + p["countdown_batch"]),
        "loss_every": every,
        "code_loss": [round(value, 4) for value in points[:, 0].tolist()],
        "planning_loss": [round(value, 4) for value in points[:, 1].tolist()],
        "settings": {"seed": training.seed, **p},
    }
    lm = DiffusionLM(training.model.eval(), training.tokenizer, training.mask_token_id, "reference")
    save_model(lm, folder, extra={"training.json": json.dumps(record, indent=1) + "\n"}, kept=["README.md"])
    return record
