"""How long two blocks of Dream 7B's sizes take on the CPU in the formats of this project and of others.

``python -m thermo_lib.studies.peers.speed`` runs in the peers' environment, writes ``reports/peers_speed.json`` unless
it is there, and prints it. Weights are random, since times don't depend on what they are, and the vocabulary is small,
so that the blocks are measured and not the head. Every method has a process of its own: one that the processor refuses
becomes a row with the reason, and the others go on. The methods take turns, and each is compared with torch's dense
bfloat16 model round by round. A pause before each turn lets the threads of the turn before it go to sleep.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from thermo_lib.evaluation.report import hardware, table
from thermo_lib.evaluation.statistics import interval
from thermo_lib.files.locks import locked
from thermo_lib.files.printing import to_its_end
from thermo_lib.files.reading import read_report
from thermo_lib.files.text import write_json
from thermo_lib.models.architectures import MaskPredictor
from thermo_lib.notebooks import ROOT, THREADS
from thermo_lib.pipeline.model import linear_names, part_as
from thermo_lib.quant.layers import QuantizedLinear
from thermo_lib.quant.planes import compile_linears
from thermo_lib.studies.full_size import PUBLISHED, random_model
from thermo_lib.studies.peers import FOLDER, llama
from thermo_lib.studies.peers.methods import stored_bits
from thermo_lib.studies.speed import PEERS_SPEED_COLUMNS

PEERS_SPEED_REPORT = ROOT / "reports" / "peers_speed.json"
SPEED_FOLDER = ROOT / FOLDER / "speed"
TOKENS = (1, 32, 256)
ROUNDS = 15
PAUSE = 0.1  # seconds before a turn
DENSE = "dense bfloat16"
_PACKAGES = ("auto-round-lib", "hqq", "llama-cpp-python", "torch")
_GROUP = 128

Run = Callable[[int], object]  # computes the logits of so many tokens
Load = Callable[[PreTrainedConfig, Path], tuple[Run, float]]  # sizes and a folder to keep files in; bits per weight
Make = Callable[[nn.Linear], tuple[nn.Module, int]]  # another project's layer, and the bits of its weight


def two_blocks(published: PreTrainedConfig = PUBLISHED["Dream 7B"]) -> PreTrainedConfig:
    """The sizes of a published model, but two blocks and 1024 tokens."""
    small = {"num_hidden_layers": 2, "vocab_size": 1024, "mask_token_id": 1023}
    settings = {k: v for k, v in published.to_dict().items() if k != "layer_types"}
    return type(published)(**settings | small)


def _model(config: PreTrainedConfig, kernel: str | None = None) -> MaskPredictor:
    torch.manual_seed(0)
    return random_model(config, config.num_hidden_layers, kernel=kernel)


def _run(model: nn.Module) -> Run:
    @torch.no_grad()
    def run(tokens: int) -> object:
        return model(torch.arange(tokens)[None])

    return run


def replace_linears(model: MaskPredictor, make: Make) -> float:
    """Put other linears into a dense model's blocks; their bits per weight."""
    bits = weights = 0
    for name in linear_names(model):
        linear = part_as(nn.Linear, model, name)
        weights += linear.weight.numel()
        replacement, stored = make(linear)
        bits += stored
        model.set_submodule(name, replacement)
    return bits / weights


def packed_bits(model: MaskPredictor) -> float:
    """Bits per weight of this project's linears in a model."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    stored = [getattr(layer, key) for layer in layers for key in (*layer.STORED, "scale")]
    stored += [layer.zero_point for layer in layers if layer.has_zero_point]
    return stored_bits(*stored) / sum(layer.in_features * layer.out_features for layer in layers)


def _replaced(config: PreTrainedConfig, make: Make) -> tuple[Run, float]:
    """The dense model with other linears in its blocks."""
    model = _model(config)
    bits = replace_linears(model, make)
    return _run(model), bits


def _dense(config: PreTrainedConfig, folder: Path) -> tuple[Run, float]:
    return _run(_model(config)), 16.0


def _ours(kernel: str) -> Load:
    def load(config: PreTrainedConfig, folder: Path) -> tuple[Run, float]:
        model = _model(config, kernel)
        compile_linears(model)
        return _run(model), packed_bits(model)

    return load


def _llamacpp(type: str, *, repack: bool = True) -> Load:
    def load(config: PreTrainedConfig, folder: Path) -> tuple[Run, float]:
        source, target = folder / "bfloat16.gguf", folder / f"{type}.gguf"
        if not target.is_file():
            if not source.is_file():
                llama.write_gguf(_model(config), config, source)
            llama.quantize_gguf(source, target, type, THREADS)
        return llama.load_gguf(target, max(TOKENS), THREADS, repack=repack), llama.linear_bits(target)

    return load


def _ark(config: PreTrainedConfig, folder: Path) -> tuple[Run, float]:
    """AutoRound's layer for its own 2-bit checkpoints: symmetric groups of 128, random codes."""
    from auto_round_kernel.qlinear import QuantLinear

    def make(linear: nn.Linear) -> tuple[nn.Module, int]:
        layer = QuantLinear(2, _GROUP, True, linear.in_features, linear.out_features, linear.bias is not None)
        layer.qweight = torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape, dtype=torch.int32)
        layer.scales = torch.full_like(layer.scales, 0.02)
        layer.post_init()
        return layer, stored_bits(layer.qweight)

    return _replaced(config, make)


def hqq_layer(linear: nn.Linear, backend: str) -> Any:
    """HQQ's 2-bit layer for a linear, where that is; it takes the linear's weight away."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend[backend])
    settings = BaseQuantizeConfig(nbits=2, group_size=_GROUP, axis=1)
    settings["weight_quant_params"]["optimize"] = False  # takes minutes, and the times stay as they are
    return HQQLinear(linear, settings, compute_dtype=torch.bfloat16, device=str(linear.weight.device))


def hqq(linear: nn.Linear, backend: str) -> tuple[nn.Module, int]:
    """``hqq_layer``, and the bits of its weight."""
    layer = hqq_layer(linear, backend)
    return layer, stored_bits(layer.W_q, layer.meta["scale"], layer.meta["zero"])


def _hqq(backend: str) -> Load:
    def load(config: PreTrainedConfig, folder: Path) -> tuple[Run, float]:
        torch._dynamo.config.recompile_limit = 64  # each size of linear and number of tokens has its own code
        return _replaced(config, partial(hqq, backend=backend))

    return load


OURS: dict[str, Load] = {
    "thermo_lib INT2": _ours("int2 w2a16"),
    "thermo_lib W2A8, dynamic": _ours("int2 w2a8 dynamic"),
    "thermo_lib W2A8, static": _ours("int2 w2a8 static"),
    "thermo_lib trellis": _ours("trellis"),
}
SPEED_METHODS: dict[str, Load] = {
    DENSE: _dense,
    **OURS,
    "llama.cpp Q2_K": _llamacpp("Q2_K"),
    "llama.cpp Q2_K, not repacked": _llamacpp("Q2_K", repack=False),
    "llama.cpp IQ2_XXS": _llamacpp("IQ2_XXS"),
    "llama.cpp IQ2_XXS, not repacked": _llamacpp("IQ2_XXS", repack=False),
    "auto-round-lib INT2": _ark,
    "HQQ": _hqq("PYTORCH"),
    "HQQ, compiled": _hqq("PYTORCH_COMPILE"),
}


def serve(load: Load, config: PreTrainedConfig, folder: Path, requests: Iterable[str], answers: TextIO) -> None:
    """Load a method, then time it as often as asked; each answer is a line of JSON.

    Args:
        load, config, folder: what is loaded, of which sizes, and where it keeps files.
        requests: numbers of tokens.
        answers: gets ``bits_per_weight`` first, then the ``seconds`` of each request, or ``why`` it failed, as the
            last.
    """

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        run, bits = load(config, folder)
        answer(bits_per_weight=bits)
        for line in requests:
            start = time.perf_counter()
            run(int(line))
            answer(seconds=time.perf_counter() - start)
    except Exception as error:  # another project's: the other methods go on
        answer(why=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}")


class Worker:
    """A process that serves one method.

    Args:
        command: starts it.

    Raises:
        RuntimeError: from the constructor and from calls, why the method failed, or how its process ended.
    """

    def __init__(self, command: Sequence[str]):
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None  # both are pipes
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            self.bits_per_weight: float = self._answer("bits_per_weight")
        except RuntimeError:
            self.close()
            raise

    def __call__(self, tokens: int) -> float:
        """Seconds that so many tokens take."""
        self._requests.write(f"{tokens}\n")
        self._requests.flush()
        return self._answer("seconds")

    def _answer(self, key: str) -> float:
        line = self._answers.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"why": self._end()}
        if "why" in answer:
            raise RuntimeError(answer["why"])
        return answer[key]

    def _end(self) -> str:
        code = self._process.wait()
        return f"its process ended with {signal.strsignal(-code)!r}" if code < 0 else f"its process ended with {code}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def take_turns(
    methods: Mapping[str, Callable[[int], float]], tokens: int, rounds: int = ROUNDS, pause: float = PAUSE
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time methods in turns, in an order that is reversed from round to round; one more round warms up.

    Args:
        methods: by name, each returns the seconds that it took.
        tokens: what they are called with.
        rounds: number of counted rounds.
        pause: seconds before each turn.

    Returns:
        The seconds of each method, one a round, and why those that are missing failed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    why: dict[str, str] = {}
    for turn in tqdm(range(rounds + 1), desc=f"{tokens} tokens", leave=False):
        for name in sorted(seconds, key=list(methods).index, reverse=bool(turn % 2)):
            time.sleep(pause)
            try:
                took = methods[name](tokens)
            except (RuntimeError, OSError) as error:
                why[name] = str(error)
                del seconds[name]
                continue
            if turn:
                seconds[name].append(took)
    return seconds, why


def rows_of(
    tokens: int, seconds: Mapping[str, Sequence[float]], bits: Mapping[str, float], why: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The report's rows of one number of tokens: milliseconds (median), and times dense with its 95 % interval.

    Args:
        tokens: their number.
        seconds: of each method, one a round; ``DENSE`` is among them.
        bits: per weight, of each method.
        why: the reasons of the methods that failed.

    Raises:
        ValueError: there are no times of the dense model.
    """
    if DENSE not in seconds:
        raise ValueError(f"{DENSE}: found no times ({why.get(DENSE)}), expected some to compare with")
    dense = np.array(seconds[DENSE])
    rows = []
    for name, values in seconds.items():
        ratios = np.array(values) / dense
        ci = interval(_median_of(ratios), len(ratios))
        row = {"method": name, "bits_per_weight": bits[name], "tokens": tokens}
        row |= {"ms": 1e3 * statistics.median(values), "times_dense": float(np.median(ratios)), "ci": list(ci)}
        rows.append(row)
    failed = [{"method": m, "bits_per_weight": bits[m], "tokens": tokens, "why": reason} for m, reason in why.items()]
    return rows + failed


def _median_of(values: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda index: float(np.median(values[index]))


def measure(
    commands: Mapping[str, Sequence[str]],
    tokens: Sequence[int] = TOKENS,
    rounds: int = ROUNDS,
    pause: float = PAUSE,
) -> list[dict[str, Any]]:
    """Start a process for each method, and time them all in turns for each number of tokens.

    Args:
        commands: of each method, what starts a process that serves it.
        tokens: their numbers.
        rounds, pause: see ``take_turns``.

    Returns:
        The rows of ``rows_of``, and one with ``method`` and ``why`` for each method that can't be loaded. A method
        that fails isn't called again: its reason stands at the larger numbers too.
    """
    failed, rows = [], []
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        bar = tqdm(commands.items(), desc="loading", unit="method", leave=False)
        for name, command in bar:
            bar.set_postfix_str(name)
            try:
                workers[name] = stack.enter_context(Worker(command))
            except RuntimeError as error:
                failed.append({"method": name, "why": str(error)})
        bits = {name: worker.bits_per_weight for name, worker in workers.items()}
        gone: dict[str, str] = {}
        for count in tokens:
            going = {name: worker for name, worker in workers.items() if name not in gone}
            seconds, why = take_turns(going, count, rounds, pause)
            gone |= why
            rows += rows_of(count, seconds, bits, gone)
    return rows + failed


def write_report(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows with the processor and the versions of the packages that are here."""
    about = {"processor": hardware()["processor"], "versions": installed(_PACKAGES)}
    write_json(output, about | {"rows": list(rows)})


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those of some packages that are here."""
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in packages if name in found}


@to_its_end
def main() -> None:
    """Measure, write and print; with ``--only`` serve one method on the standard streams."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SPEED_METHODS, help="serve one method: a line of tokens, a line of JSON")
    method = parser.parse_args().only
    if method:
        torch.set_num_threads(THREADS)
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
            os.dup2(2, 1)  # what the libraries print is no answer
            serve(SPEED_METHODS[method], two_blocks(), SPEED_FOLDER, sys.stdin, answers)
        return
    with locked(PEERS_SPEED_REPORT, wait=True):
        if not PEERS_SPEED_REPORT.is_file():
            command = [sys.executable, "-m", "thermo_lib.studies.peers.speed", "--only"]
            write_report(PEERS_SPEED_REPORT, measure({name: [*command, name] for name in SPEED_METHODS}))
    print(table(read_report(PEERS_SPEED_REPORT, rows={"method": str})["rows"], PEERS_SPEED_COLUMNS))


if __name__ == "__main__":
    sys.exit(main())
