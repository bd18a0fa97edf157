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
from thermo_lib.models.lm import DiffusionLM, load_model
from thermo_lib.pipeline.activations import Samples, requantize_activations, resmooth, shared_input_samples
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, linear_names, names_by_block
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import load_quantized, save_quantized
from thermo_lib.time_aware.markov import MarkovReport
from thermo_lib.time_aware.smoothing import SMOOTHING_METHODS, WINDOWED
from thermo_lib.workbench.job import Job, estimated_seconds

_BEAM = 16  # of trellises: a fourth of what presets take, a fourth of the time
WEIGHTS: dict[str, dict[str, Any]] = {  # two bits unless the name says otherwise
    "round-to-nearest": {"method": "rtn"},
    "least squares": {"method": "least_squares"},
    "GPTQ": {"method": "gptq"},
    "trellis": {"method": "trellis", "bits": 2, "spread": False, "token_weights": "uniform", "beam": _BEAM},
    "trellis, 2.17 bits spread": {"method": "trellis", "token_weights": "uniform", "beam": _BEAM},
    "round-to-nearest, 4 bits": {"method": "rtn", "bits": 4},
    "least squares, 4 bits": {"method": "least_squares", "bits": 4},
    "GPTQ, 4 bits": {"method": "gptq", "bits": 4},
}
# Made while one waits.
QUICK = tuple(name for name, how in WEIGHTS.items() if how["method"] in ("rtn", "least_squares"))
ACTIVATION_BITS = (16, 8, 4, 3, 2)
SMOOTHING = (None, *SMOOTHING_METHODS)


@dataclass(frozen=True)
class Choice:
    """What is chosen.

    Attributes:
        weights: one of ``WEIGHTS``.
        activation_bits: one of ``ACTIVATION_BITS``, 16 for not quantized; else in static ranges.
        time_groups: number of groups of timesteps with ranges of their own; 1 for one range at all timesteps.
        smoothing: one of ``SMOOTHING``.
        window: number of timesteps smoothed on each side of a boundary, 1 to 20.
        layer: name of the linear whose parameters are shown.

    Raises:
        ValueError: a value that isn't allowed; names the field, what was found and what is allowed.
    """

    weights: str = "least squares"
    activation_bits: int = 4
    time_groups: int = 3
    smoothing: str | None = "linear"
    window: int = 3
    layer: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("weights", tuple(WEIGHTS)), ("activation_bits", ACTIVATION_BITS)):
            if getattr(self, name) not in allowed:
                words = ", ".join(map(str, allowed))
                raise ValueError(f"{name}: found {getattr(self, name)!r:.80}, allowed are {words}")
        if self.smoothing not in SMOOTHING:
            words = ", ".join(map(str, SMOOTHING))
            raise ValueError(f"smoothing: found {self.smoothing!r:.80}, allowed are {words}")
        for name, most in (("time_groups", 64), ("window", 20)):
            found = getattr(self, name)
            if type(found) is not int or not 1 <= found <= most:
                raise ValueError(f"{name}: found {found!r:.80}, allowed are whole numbers from 1 to {most}")


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
        path_kl: path KL to full precision at each timestep, nats a sequence.
        total, total_ci: its sum over the timesteps, and a 95 % interval over sequences.
        change, change_ci: of the total, against the view before; None for the first.
        sequences: number of trajectories that path KL is measured on.
        bits_per_weight: everything stored for the quantized layers.
        megabytes: of all that is stored of the model.
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
    total: float
    total_ci: tuple[float, float]
    change: float | None
    change_ci: tuple[float, float] | None
    sequences: int
    bits_per_weight: float
    megabytes: float
    texts: dict[str, list[list[str]]]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Session:
    """A model on the workbench.

    Args:
        model: see ``load_model``.
        folder: of what is made here, such as slow weights and saved models.
        trajectories: number of the model's own trajectories that path KL is measured on.
        code_sequences, puzzles: what the calibration states are drawn from, see ``calibration_batches``.
        timesteps: ``T``.
        tokens: sampled of each timestep and kind of calibration states, which ranges are fitted on.
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
        self.sizes = {"sequences": code_sequences, "puzzles": puzzles}
        self.lm: DiffusionLM = load_model(model)
        batches = calibration_batches(self.lm, seed, **self.sizes)
        batches = [pair for pair in batches if len(pair[0])]
        self.calibration: Calibration = calibrate(self.lm, batches, timesteps=timesteps, seed=seed, progress=False)
        size: dict[str, Any] = {"sequences": 1, "trajectories": trajectories, "sudoku": 0}
        self.suite: Suite = build_suite(self.lm, timesteps=timesteps, seed=seed, **size)
        self.prompt, self.start = "", torch.empty(0)
        self._weights: dict[str, tuple[QuantizedLM, Samples]] = {}
        self._ranges: dict[tuple[str, int, int], QuantizedLM] = {}
        self._last: np.ndarray | None = None
        self._full: tuple[str, list[list[str]]] | None = None
        self.ask_puzzle()

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
        self.start = torch.tensor([[*given, *[self.lm.mask_token_id] * tokens]])
        self._full = None

    def fields_of(self, choice: Choice) -> dict[str, Any]:
        """What ``ThermoConfig`` is given; without quantized activations nothing depends on the timestep."""
        fields: dict[str, Any] = {"weights": WEIGHTS[choice.weights], "timesteps": self.timesteps}
        if choice.activation_bits < 16:
            fields["activations"] = {"ranges": "static", "bits": choice.activation_bits, "tokens": self.tokens}
            if choice.time_groups > 1:
                count, half = self._groups(choice)
                is_windowed = choice.smoothing in WINDOWED
                fields["time_groups"] = {
                    "count": count,
                    "smoothing": None if is_windowed and not half else choice.smoothing,
                }
                if is_windowed and half:
                    fields["time_groups"]["window"] = min(choice.window, half)
        return fields

    def _groups(self, choice: Choice) -> tuple[int, int]:
        """The number of groups, and half of the timesteps of the longest, which is the widest window."""
        count = min(choice.time_groups, self.timesteps)
        return count, -(-self.timesteps // count) // 2

    def config_of(self, choice: Choice) -> ThermoConfig:
        """The configuration that a choice means."""
        return ThermoConfig(**self.fields_of(choice))

    def notes_of(self, choice: Choice) -> list[str]:
        """What of a choice has no effect, a line each."""
        found = []
        if choice.activation_bits == 16:
            if choice.time_groups > 1:
                found.append("activation_bits: found 16, so nothing depends on the timestep; choose 8 or fewer.")
            return found
        if choice.time_groups == 1 and choice.smoothing is not None:
            found.append("time_groups: found 1, which has no boundary to smooth; choose 2 or more.")
        if choice.time_groups > self.timesteps:
            found.append(f"time_groups: found {choice.time_groups}, shown are {self.timesteps}, one for each timestep.")
        half = self._groups(choice)[1]
        if choice.time_groups > 1 and choice.smoothing in WINDOWED and choice.window > half:
            acts = (
                f"half of a group is {half}, which is what acts" if half else "a group has one timestep, nothing acts"
            )
            found.append(f"window: found {choice.window}, {acts}.")
        return found

    def is_ready(self, weights: str) -> bool:
        """Whether weights are there, or made while one waits."""
        return weights in self._weights or weights in QUICK or (self._place(weights) / "config.json").is_file()

    def seconds_of(self, weights: str) -> float:
        """About how long weights take to make on this machine, from one linear and one pass that are timed."""
        return 0.0 if self.is_ready(weights) else estimated_seconds(self.lm, self._plain(weights), self.calibration)

    def make(self, weights: str) -> Job:
        """Begin to make slow weights, in a process of their own that can be stopped; the same call goes on."""
        blocks = len(names_by_block(self.layers))
        return Job.begin(self.model, blocks, self._plain(weights), self.calibration, self._place(weights))

    def _plain(self, weights: str) -> ThermoConfig:
        return ThermoConfig(weights=WEIGHTS[weights], timesteps=self.timesteps)

    def _place(self, weights: str) -> Path:
        return self.folder / weights.replace(",", "").replace(" ", "-")

    def weights(self, name: str) -> tuple[QuantizedLM, Samples]:
        """A model with quantized weights alone, and samples of its linears' inputs.

        Raises:
            ValueError: weights that aren't made yet, see ``make``.
        """
        if name not in self._weights:
            if name in QUICK:
                found = quantize(self.lm, self._plain(name))
            elif self.is_ready(name):
                found = load_quantized(self._place(name))
            else:
                raise ValueError(f"weights: found {name!r}, which aren't made yet; press Make, or choose other ones")
            self._weights[name] = found, shared_input_samples(found, self.calibration, self.tokens)
        return self._weights[name]

    def build(self, choice: Choice) -> QuantizedLM:
        """The model of a choice: what ``quantize`` makes of its configuration and this session's calibration states."""
        config = self.config_of(choice)
        weights, samples = self.weights(choice.weights)
        if config.activations is None:
            return weights
        count = 1 if config.time_groups is None else config.time_groups.count
        key = choice.weights, choice.activation_bits, count
        if key not in self._ranges:
            grouping = None if count == 1 else {"count": count, "smoothing": None}
            changes: dict[str, Any] = {"activations": config.activations, "time_groups": grouping}
            self._ranges[key] = requantize_activations(weights, samples=samples, **changes)
        grouped = self._ranges[key]
        if config.time_groups is None or config.time_groups.smoothing is None:
            return grouped
        return resmooth(grouped, config.time_groups.smoothing, config.time_groups.window)

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
        found = path_kl(self.lm, lm, states, self.timesteps, reference_outputs=outputs)
        each = found.per_sequence.sum(1).numpy()
        change = change_ci = None
        if self._last is not None:
            difference = each - self._last
            change, change_ci = float(difference.mean()), _interval(difference)
        self._last = each
        raw, smoothed = lm.time_params.get(layer, []), lm.smoothed_params().get(layer, [])
        grouped = [float(p.scale.mean()) for p in raw]
        return View(
            choice=choice,
            config=lm.config,
            layer=layer,
            before=[grouped[lm.config.groups.group_of(t)] for t in range(self.timesteps)] if grouped else [],
            after=[float(p.scale.mean()) for p in smoothed],
            smoothness=markov(lm),
            path_kl=found.per_timestep.tolist(),
            total=found.total,
            total_ci=_interval(each),
            change=change,
            change_ci=change_ci,
            sequences=len(each),
            bits_per_weight=lm.bits_per_weight,
            megabytes=sum(tensor.nbytes for tensor in lm.model.state_dict().values()) / 1e6,
            texts=self._texts(lm),
            notes=self.notes_of(choice),
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
        settings = "\n".join(f"    {name}={value!r}," for name, value in self.fields_of(choice).items())
        size = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        return (
            "import thermo_lib as thermo\n"
            "from thermo_lib.diffusion.states import calibration_batches\n\n"
            f"lm = thermo.load_model({self.model!r})\n"
            f"batches = calibration_batches(lm, {self.seed}, {size})  # few, as on the workbench\n"
            f"calibration = thermo.calibrate(lm, batches, timesteps={self.timesteps}, seed={self.seed})\n"
            f"config = thermo.ThermoConfig(\n{settings}\n)\n"
            "quantized = thermo.quantize(lm, config, calibration)\n"
        )


def _interval(values: np.ndarray) -> tuple[float, float]:
    if len(values) < 2:
        return float("nan"), float("nan")
    return mean_interval(values, resamples=500)


def differences(texts: Mapping[str, list[list[str]]], step: int) -> list[bool]:
    """Where the quantized model has written another token at a step than full precision has; masks don't differ."""
    pairs = zip(texts["full precision"][step], texts["quantized"][step], strict=True)
    return [MASKED not in pair and pair[0] != pair[1] for pair in pairs]
