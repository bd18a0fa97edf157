"""What the workbench shows of a choice: parameters over time, path KL, sizes, and a text being denoised.

A session holds a model, few calibration states and few trajectories, so that most choices are shown within two seconds
on two cores. What is measured on so little has wide intervals, which are shown with it. Nothing here needs a browser.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thermo_lib.data.puzzles import TASK_LENGTH, encode_puzzles, knows_tasks, make_puzzles
from thermo_lib.diffusion.path_kl import path_kl
from thermo_lib.diffusion.states import Calibration, calibrate, calibration_batches
from thermo_lib.evaluation.demo import MASKED, denoising
from thermo_lib.evaluation.scores import Suite, build_suite
from thermo_lib.evaluation.statistics import mean_interval
from thermo_lib.evaluation.summary import markov
from thermo_lib.files.snapshots import digest
from thermo_lib.models.lm import DiffusionLM, load_model
from thermo_lib.pipeline.activations import Samples, requantize_activations, resmooth, shared_input_samples
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, linear_names
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import load_quantized, save_quantized
from thermo_lib.quant.layers import keeping_weights
from thermo_lib.time_aware.markov import MarkovReport
from thermo_lib.workbench.choices import NAMED, Choice
from thermo_lib.workbench.job import Job, estimated_seconds

RANGE_SIZES = 2, 1  # code sequences and puzzles that ranges are fitted on
QUICK = ("rtn", "least_squares")  # methods for the weights that are made while one waits


@dataclass(frozen=True)
class View:
    """What is shown of a choice.

    Attributes:
        choice: it.
        config: the configuration that it means.
        layer: whose parameters are shown.
        before, after: the scale of the layer's input at each timestep, before and after smoothing; empty where none
            depends on the timestep.
        smoothness: the Markov score with its boundaries; None where nothing depends on the timestep.
        path_kl, path_kl_ci: path KL to full precision at each timestep, nats a sequence, and its 95 % intervals over
            sequences.
        total, total_ci: its sum over the timesteps, and a 95 % interval over sequences.
        change, change_ci: of the total, against the view before; None for the first.
        changes, changes_ci: the same at each timestep; empty for the first.
        sequences: number of trajectories that path KL is measured on.
        bits_per_weight: everything stored for the quantized layers.
        megabytes: of all that is stored of the model.
        prompt: a text that both continue; empty for a puzzle.
        given: the digit of a puzzle at each token that is written, empty where none is given.
        texts: ``full precision`` and ``quantized`` to the tokens at each step of denoising the prompt.
        notes: what else should be known of it, a line each.
        seconds: that it took.
    """

    choice: Choice
    config: ThermoConfig
    layer: str
    before: list[float]
    after: list[float]
    smoothness: MarkovReport | None
    path_kl: list[float]
    path_kl_ci: list[tuple[float, float]]
    total: float
    total_ci: tuple[float, float]
    change: float | None
    change_ci: tuple[float, float] | None
    changes: list[float]
    changes_ci: list[tuple[float, float]]
    sequences: int
    bits_per_weight: float
    megabytes: float
    prompt: str
    given: list[str]
    texts: dict[str, list[list[str]]]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Session:
    """A model on the workbench.

    Args:
        model: see ``load_model``.
        folder: of what is made here, such as slow weights and saved models.
        trajectories: number of the model's own trajectories that path KL is measured on.
        code_sequences, puzzles: what the calibration states are drawn from, see ``calibration_batches``. Ranges are
            fitted on those of two sequences and one puzzle.
        timesteps: ``T``.
        tokens: sampled of each timestep and kind of the states that ranges are fitted on.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        model: str = "reference",
        folder: Path = Path("artifacts/scratch/workbench"),
        *,
        trajectories: int = 4,
        code_sequences: int = 4,
        puzzles: int = 2,
        timesteps: int = 16,
        tokens: int = 16,
        seed: int = 0,
    ):
        self.model, self.folder, self.timesteps, self.tokens, self.seed = model, folder, timesteps, tokens, seed
        self.sizes = code_sequences, puzzles
        self.lm: DiffusionLM = load_model(model)
        self.calibration, self.range_states = (self._states(*sizes) for sizes in (self.sizes, RANGE_SIZES))
        self._made_of = digest(self.lm.identity(), self.calibration.tensors())
        size: dict[str, Any] = {"sequences": 1, "trajectories": trajectories, "sudoku": 0}
        self.suite: Suite = build_suite(self.lm, timesteps=timesteps, seed=seed, **size)
        self.prompt, self.start, self.given = "", torch.empty(0), [""]
        self._weights: dict[str, QuantizedLM] = {}
        self._samples: dict[str, Samples] = {}
        self._ranges: dict[tuple[str, str, int], QuantizedLM] = {}
        self._last: np.ndarray | None = None
        self._full: tuple[str, list[list[str]]] | None = None
        self.ask_puzzle()

    def _states(self, code_sequences: int, puzzles: int) -> Calibration:
        batches = calibration_batches(self.lm, self.seed, sequences=code_sequences, puzzles=puzzles)
        kept = [pair for pair in batches if len(pair[0])]
        return calibrate(self.lm, kept, timesteps=self.timesteps, seed=self.seed, progress=False)

    @property
    def layers(self) -> list[str]:
        """The linears whose parameters can be shown."""
        return linear_names(self.lm.model)

    def ask_puzzle(self) -> None:
        """Let models solve a 4x4 Sudoku from now on; a model that doesn't know the task continues code."""
        if not knows_tasks(self.lm.tokenizer):
            self.ask("def __init__(self")
            return
        (puzzle,) = make_puzzles("sudoku", 1, self.seed, test=True)
        ids, is_answer = encode_puzzles([puzzle], self.lm.tokenizer, TASK_LENGTH)
        self.prompt, self.start = puzzle.input, ids.masked_fill(is_answer, self.lm.mask_token_id)
        clues = [clue if clue in "1234" else "" for clue in puzzle.input]
        self.given = clues + [""] * (int(is_answer.sum()) - len(clues))
        self._full = None

    def ask(self, prompt: str, tokens: int = 24) -> None:
        """Let models continue another text from now on.

        Raises:
            ValueError: an empty text, or tokens below 1.
        """
        given = self.lm.tokenizer.encode(prompt).ids
        if not given:
            raise ValueError(f"prompt: found {prompt!r:.80}, allowed is a text that isn't empty")
        if tokens < 1:
            raise ValueError(f"tokens: found {tokens}, allowed are whole numbers from 1")
        self.prompt = prompt
        self.start, self.given = torch.tensor([[*given, *[self.lm.mask_token_id] * tokens]]), [""] * tokens
        self._full = None

    def is_ready(self, choice: Choice) -> bool:
        """Whether a choice's weights are there, or made while one waits.

        Raises:
            ValueError: bits that the method can't have.
        """
        is_made = choice.name in self._weights or (self._place(choice) / "config.json").is_file()
        config = choice.weights_config(self.timesteps)
        return is_made or (config.weights.method in QUICK and not config.training)

    def seconds_of(self, choice: Choice) -> float:
        """About how long a choice's weights take to make on this machine, from what is timed of them."""
        config = choice.weights_config(self.timesteps)
        return 0.0 if self.is_ready(choice) else estimated_seconds(self.lm, config, self.calibration)

    def make(self, choice: Choice) -> Job:
        """Begin to make slow weights, in a process of their own that can be stopped; the same call goes on."""
        return Job.begin(self.model, choice.weights_config(self.timesteps), self.calibration, self._place(choice))

    def _place(self, choice: Choice) -> Path:
        """Where made weights are kept: another folder for another model, calibration or setting of the same name."""
        made_of = digest(choice.weights_config(self.timesteps).digest(), self._made_of)
        return self.folder / f"{choice.name}-{made_of[:8]}"

    def weights(self, choice: Choice) -> QuantizedLM:
        """The model whose weights are a choice's; its activations aren't quantized unless a preset has it so.

        Raises:
            ValueError: weights that aren't made yet, see ``make``.
        """
        if choice.name not in self._weights:
            if not self.is_ready(choice):
                raise ValueError(f"weights: {choice.name} aren't made yet; press Make, or choose other ones")
            if (self._place(choice) / "config.json").is_file():
                self._weights[choice.name] = load_quantized(self._place(choice))
            else:
                self._weights[choice.name] = quantize(self.lm, choice.weights_config(self.timesteps))
        return self._weights[choice.name]

    def build(self, choice: Choice) -> QuantizedLM:
        """The model of a choice: its weights, and then its activations in ranges fitted on few of the states."""
        weights, changes = self.weights(choice), choice.activation_fields(self.timesteps, self.tokens)
        if changes is None:
            return weights
        if not choice.is_static:
            return requantize_activations(weights, **changes)
        if choice.name not in self._samples:
            with keeping_weights(weights.quantized_layers().values()):
                samples = shared_input_samples(weights, self.range_states, self.tokens, decisive=False)
            self._samples[choice.name] = samples
        groups = changes["time_groups"] or {"count": 1, "smoothing": None}
        key = choice.name, str(choice.activation_bits), groups["count"]
        if key not in self._ranges:
            rough = None if groups["count"] == 1 else groups | {"smoothing": None, "window": None}
            how: dict[str, Any] = {"activations": changes["activations"], "time_groups": rough}
            self._ranges[key] = requantize_activations(weights, samples=self._samples[choice.name], **how)
        if groups["smoothing"] is None:
            return self._ranges[key]
        return resmooth(self._ranges[key], groups["smoothing"], groups.get("window"))

    def show(self, choice: Choice) -> View:
        """Everything that is shown of a choice.

        Raises:
            ValueError: weights that aren't made yet, or a layer that isn't there.
        """
        start = time.perf_counter()
        layers = self.layers
        layer = choice.layer or layers[0]
        if layer not in layers:
            allowed = f"{layers[0]} to {layers[-1]}"
            raise ValueError(f"layer: found {layer!r:.80}, allowed are the quantized linears, {allowed}")
        lm = self.build(choice)
        states, outputs = self.suite.trajectories, self.suite.reference_outputs
        with keeping_weights(lm.quantized_layers().values()):
            found = path_kl(self.lm, lm, states, self.timesteps, reference_outputs=outputs)
            texts = self._texts(lm)
        each = found.per_sequence.numpy()  # (sequences, timesteps)
        difference = None if self._last is None else each - self._last
        self._last = each
        raw, smoothed = lm.time_params.get(layer, []), lm.smoothed_params([layer]).get(layer, [])
        grouped = [float(p.scale.mean()) for p in raw]
        return View(
            choice=choice,
            config=lm.config,
            layer=layer,
            before=[grouped[lm.config.groups.group_of(t)] for t in range(self.timesteps)] if grouped else [],
            after=[float(p.scale.mean()) for p in smoothed],
            smoothness=markov(lm),
            path_kl=found.per_timestep.tolist(),
            path_kl_ci=[_interval(step) for step in each.T],
            total=found.total,
            total_ci=_interval(each.sum(1)),
            change=None if difference is None else float(difference.sum(1).mean()),
            change_ci=None if difference is None else _interval(difference.sum(1)),
            changes=[] if difference is None else difference.mean(0).tolist(),
            changes_ci=[] if difference is None else [_interval(step) for step in difference.T],
            sequences=len(each),
            bits_per_weight=lm.bits_per_weight,
            megabytes=sum(tensor.nbytes for tensor in lm.model.state_dict().values()) / 1e6,
            prompt="" if any(self.given) else self.prompt,
            given=self.given,
            texts=texts,
            notes=choice.notes(self.timesteps),
            seconds=time.perf_counter() - start,
        )

    def _texts(self, lm: QuantizedLM) -> dict[str, list[list[str]]]:
        if self._full is None or self._full[0] != self.prompt:
            self._full = self.prompt, self._steps(self.lm)
        return {"full precision": self._full[1], "quantized": self._steps(lm)}

    def _steps(self, lm: DiffusionLM) -> list[list[str]]:
        """The tokens that are written, at each step of the denoising and at its end; ``·`` where one is masked."""
        open_places = (self.start[0] == self.lm.mask_token_id).nonzero().flatten().tolist()
        states = denoising(lm, self.start, self.timesteps)
        return [[self._word(int(state[at])) for at in open_places] for state in states]

    def _word(self, token: int) -> str:
        if token == self.lm.mask_token_id:
            return MASKED
        return self.lm.tokenizer.decode([token], skip_special_tokens=False)

    def save(self, choice: Choice, name: str = "model") -> Path:
        """Save the model of a choice, and say where; ``load_quantized`` reads the folder.

        Raises:
            ValueError: a name that isn't one of a folder.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name):
            raise ValueError(f"name: found {name!r:.80}, allowed are up to 64 letters, digits, -, _ and .")
        folder = self.folder / "saved" / name
        save_quantized(self.build(choice), folder)
        return folder

    def code(self, choice: Choice) -> str:
        """Lines of Python that make the model of a choice."""
        weights, changes = choice.weights_fields(), choice.activation_fields(self.timesteps, self.tokens)
        config, states = f"timesteps={self.timesteps})", ""
        if weights is None:
            config = f"thermo.ThermoConfig.preset({NAMED[choice.weights]!r}, {config}"
        else:
            config = f"thermo.ThermoConfig(weights={weights!r}, {config}"
        if choice.weights_config(self.timesteps).needs_calibration:
            states = f", {self._states_code(*self.sizes)}"
        needed = ["requantize_activations"] * bool(changes) + ["shared_input_samples"] * choice.is_static
        lines = ["import thermo_lib as thermo"]
        if states or choice.is_static:
            lines.append("from thermo_lib.diffusion.states import calibration_batches")
        if needed:
            lines.append(f"from thermo_lib.pipeline.activations import {', '.join(needed)}")
        lines += ["", f"lm = thermo.load_model({self.model!r})", f"config = {config}"]
        lines.append(f"quantized = thermo.quantize(lm, config{states})")
        if changes:
            lines += [f"{name} = {value!r}" for name, value in changes.items()]
            samples = ""
            if choice.is_static:
                lines.append(f"few = {self._states_code(*RANGE_SIZES)}")
                lines.append(f"samples = shared_input_samples(quantized, few, {self.tokens}, decisive=False)")
                samples = "samples=samples, "
            fields = ", ".join(f"{name}={name}" for name in changes)
            lines.append(f"quantized = requantize_activations(quantized, {samples}{fields})")
        return "\n".join([*lines, ""])

    def _states_code(self, code_sequences: int, puzzles: int) -> str:
        batches = f"calibration_batches(lm, {self.seed}, sequences={code_sequences}, puzzles={puzzles})"
        return f"thermo.calibrate(lm, {batches}, timesteps={self.timesteps}, seed={self.seed})"


def _interval(values: np.ndarray) -> tuple[float, float]:
    if len(values) < 2:
        return float("nan"), float("nan")
    return mean_interval(values, resamples=500)


def differences(texts: Mapping[str, list[list[str]]], step: int) -> list[bool]:
    """Where the quantized model has written another token at a step than full precision has; masks don't differ."""
    pairs = zip(texts["full precision"][step], texts["quantized"][step], strict=True)
    return [MASKED not in pair and pair[0] != pair[1] for pair in pairs]
