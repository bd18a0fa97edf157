"""Weights that take longer than one waits: how long, and made in a process that can be stopped and goes on.

``python -m thermo_lib.workbench.job ORDER`` is that process. It keeps what is finished, see ``quantize``'s ``resume``.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from thermo_lib.diffusion.states import Calibration
from thermo_lib.files.reading import read_object
from thermo_lib.files.text import write_json
from thermo_lib.models.lm import DiffusionLM, load_model
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import linear_names, part_as
from thermo_lib.pipeline.parts import Phase, Sequential
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.quantizers import quantizer_of
from thermo_lib.pipeline.storage import save_quantized

_START = 10.0  # seconds until a Python has imported everything
_PASSES = 2 * 1.6  # over the states: for the Hessians and to go on, in float64
_DESCENT = 6  # passes that a step of training takes: full precision, there and back, and the coding of what is trained
_BAR = re.compile(r"([^\r\n:]+): +(\d+)%\|[^\r\n]*<([\d:?]+)")


def estimated_seconds(lm: DiffusionLM, config: ThermoConfig, calibration: Calibration) -> float:
    """About how long it takes to quantize weights, from one linear that is quantized and one batch that is run.

    Args:
        lm: the full-precision model.
        config: how; only the weights count.
        calibration: the states.
    """
    names = linear_names(lm.model)
    linear = part_as(nn.Linear, lm.model, names[0])
    width = linear.in_features
    x = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0))
    quantizer = quantizer_of(config)
    hessian = (x.T @ x).double()[None] if quantizer.needs_hessians else None
    start = time.perf_counter()
    if hessian is not None and quantizer.needs_all_hessians:
        quantizer.see(names[0], linear, hessian.sum(0))
        quantizer.decide()
    quantizer.code(names[0], linear.weight.detach(), hessian)
    one = (time.perf_counter() - start) / linear.weight.numel()
    part = calibration.parts[0]
    rows = part.ids[:8]
    times = []
    for _ in range(3):  # the first is slow, and others are where the machine does something else
        start = time.perf_counter()
        with torch.no_grad():
            lm.model.hidden(rows)
        times.append(time.perf_counter() - start)
    a_token = min(times) / rows.numel()
    weights = sum(lm.model.get_parameter(f"{name}.weight").numel() for name in names)
    tokens = _PASSES * sum(part.ids.numel() for part in calibration.parts)
    length = max(part.ids.shape[1] for part in calibration.parts)
    tokens += _DESCENT * length * sum(_states(phase) for phase in config.training)
    return _START + one * weights + a_token * tokens


def _states(phase: Phase) -> int:
    """About how many states a phase trains the whole model on, or each block."""
    a_step = phase.batch or (phase.num_texts or 0) + (phase.num_prompts or 0)
    sets = 4 if isinstance(phase, Sequential) else 1  # of linears with an input, in a block: steps for each
    return sets * (phase.steps or 0) * a_step


@dataclass(frozen=True)
class Progress:
    """What a job is doing.

    Attributes:
        what: the part of the work, as its bar is called; empty before the first.
        share: how much of that part is done, 0-1.
        left: time until it is done, as ``05:12``; empty where it isn't known.
    """

    what: str = ""
    share: float = 0.0
    left: str = ""


@dataclass
class Job:
    """Weights that are being made.

    Attributes:
        place: the folder that ``load_quantized`` reads once they are done.
        process: makes them.
        began: when, in seconds of ``time.monotonic``.
    """

    place: Path
    process: "subprocess.Popen[bytes]"
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, model: str, config: ThermoConfig, calibration: Calibration, place: Path) -> "Job":
        """Start the process; what an earlier one finished isn't made again."""
        work = place.with_name(f"{place.name}-unfinished")
        work.mkdir(parents=True, exist_ok=True)
        calibration.save(work / "calibration.safetensors")
        order = {"model": model, "config": config.model_dump(mode="json"), "output": str(place.resolve())}
        write_json(work / "order.json", order)
        command = [sys.executable, "-m", "thermo_lib.workbench.job", str((work / "order.json").resolve())]
        with (work / "said.txt").open("wb") as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        return cls(place, process)

    def _said(self) -> str:
        path = self.place.with_name(f"{self.place.name}-unfinished") / "said.txt"
        return path.read_bytes().decode(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether the process is at work."""
        return self.process.poll() is None

    @property
    def progress(self) -> Progress:
        """What the last bar of the process says."""
        bars = _BAR.findall(self._said())
        if not bars:
            return Progress()
        what, percent, left = bars[-1]
        return Progress(what.strip(), int(percent) / 100, "" if "?" in left else left)

    def stop(self) -> None:
        """End the process; what it has finished stays for the next one."""
        self.process.terminate()
        self.process.wait()

    def result(self) -> str:
        """What became of it, on one line.

        Raises:
            ValueError: it ended with an error, which is said.
        """
        status = self.process.wait()
        if status < 0:
            done = self.progress
            at = f" in {done.what} at {done.share:.0%}" if done.what else ""
            return f"stopped{at}; the next start goes on from what it had finished"
        if status:
            said = self._said().replace("\r", "\n").strip().rpartition("\n")[2].strip()
            raise ValueError(f"weights: could not be made ({said or f'status {status}':.300})")
        return f"made in {time.monotonic() - self.began:.0f} s"


def main(path: Path) -> None:
    """Carry out an order."""
    order = read_object(path)
    config = ThermoConfig(**order["config"])
    calibration = Calibration.load(path.with_name("calibration.safetensors"))
    quantized = quantize(load_model(order["model"]), config, calibration, resume=path.parent / "blocks", progress=True)
    save_quantized(quantized, order["output"])
    json.dump({"bits_per_weight": quantized.bits_per_weight}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
