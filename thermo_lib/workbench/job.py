"""Weights that take longer than one waits: how long, and made in a process that can be stopped and goes on.

``python -m thermo_lib.workbench.job ORDER`` is that process. It keeps finished blocks, see ``quantize``'s ``resume``.
"""

import json
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
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.quantizers import quantizer_of
from thermo_lib.pipeline.storage import save_quantized

_START = 10.0  # seconds until a Python has imported everything
_PASSES = 2 * 1.6  # over the states: for the Hessians and to go on, in float64


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
    start = time.perf_counter()
    with torch.no_grad():
        lm.model.hidden(rows)
    a_token = (time.perf_counter() - start) / rows.numel()
    weights = sum(lm.model.get_parameter(f"{name}.weight").numel() for name in names)
    tokens = sum(part.ids.numel() for part in calibration.parts)
    return _START + one * weights + _PASSES * a_token * tokens


@dataclass
class Job:
    """Weights that are being made.

    Attributes:
        place: the folder that ``load_quantized`` reads once they are done.
        blocks: number of the model's blocks.
        process: makes them.
        began: when, in seconds of ``time.monotonic``.
        before: number of blocks that were done when it began.
    """

    place: Path
    blocks: int
    process: "subprocess.Popen[bytes]"
    before: int
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, model: str, blocks: int, config: ThermoConfig, calibration: Calibration, place: Path) -> "Job":
        """Start the process on a model of so many blocks; those that an earlier one finished aren't made again."""
        work = place.with_name(f"{place.name}-unfinished")
        work.mkdir(parents=True, exist_ok=True)
        calibration.save(work / "calibration.safetensors")
        order = {"model": model, "config": config.model_dump(mode="json"), "output": str(place.resolve())}
        write_json(work / "order.json", order)
        command = [sys.executable, "-m", "thermo_lib.workbench.job", str((work / "order.json").resolve())]
        with (work / "said.txt").open("wb") as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        return cls(place, blocks, process, _finished(work))

    @property
    def _work(self) -> Path:
        return self.place.with_name(f"{self.place.name}-unfinished")

    @property
    def is_running(self) -> bool:
        """Whether the process is at work."""
        return self.process.poll() is None

    @property
    def share(self) -> float:
        """Share of the blocks that are finished, 0-1."""
        return _finished(self._work) / self.blocks

    @property
    def seconds_left(self) -> float | None:
        """About how long it takes from now; None before the first block is finished."""
        made = _finished(self._work) - self.before
        if made < 1:
            return None
        left = self.blocks - self.before - made
        return (time.monotonic() - self.began) / made * left

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
            return f"stopped after {_finished(self._work)} of {self.blocks} blocks, which the next start goes on from"
        if status:
            said = (self._work / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ValueError(f"weights: could not be made ({said[-1] if said else f'status {status}':.300})")
        return f"made in {time.monotonic() - self.began:.0f} s"


def _finished(work: Path) -> int:
    return len(list((work / "blocks").glob("weights-*.safetensors")))


def main(path: Path) -> None:
    """Carry out an order."""
    order = read_object(path)
    config = ThermoConfig(**order["config"])
    calibration = Calibration.load(path.with_name("calibration.safetensors"))
    quantized = quantize(load_model(order["model"]), config, calibration, resume=path.parent / "blocks")
    save_quantized(quantized, order["output"])
    json.dump({"bits_per_weight": quantized.bits_per_weight}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
