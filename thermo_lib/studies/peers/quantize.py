"""Quantize a model with every peer and setting: ``python -m thermo_lib.studies.peers.quantize``.

Runs in the peers' environment. Every setting has a process of its own, so that one that crashes or runs out of memory
is one entry with its error; complete results, and those that the report has already, are kept. Each leaves
``<name>.safetensors``, the dequantized float32 weights of the linears inside the blocks with what else was trained, and
``<name>.json``.
"""

import argparse
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from thermo_lib.files.locks import locked
from thermo_lib.files.printing import to_its_end
from thermo_lib.files.reading import read_object, read_report
from thermo_lib.files.text import write_json
from thermo_lib.files.whole import replacing
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.presets import PRESETS
from thermo_lib.studies.peers import CHECK, LOSS_STEPS, NAMES, Entry
from thermo_lib.studies.peers.methods import ADAPTERS, compare_gptq
from thermo_lib.studies.peers.subjects import REFERENCE, SUBJECTS, Subject


@dataclass(frozen=True)
class Job:
    """One peer at one setting.

    Attributes:
        method: the peer's name.
        setting: the setting in words; "default" and "recommended" are the peer's own.
        adapter: a key of ``methods.ADAPTERS``.
        options: what the adapter takes.
        package: distribution whose version counts; empty for this project.
        modules: what to import before the clock starts.
    """

    method: str
    setting: str
    adapter: str
    options: dict[str, Any]
    package: str = ""
    modules: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """A file name."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.method} {self.setting}".lower()).strip("-")


def _thermo(method: str, setting: str, **options: Any) -> Job:
    return Job(method, setting, "thermo", options)


def _gptqmodel(setting: str, **options: Any) -> Job:
    modules = ("gptqmodel.quantization.gptq", "gptqmodel.nn_modules.qlinear.torch")
    return Job("GPTQModel", setting, "gptqmodel", options, "gptqmodel", modules)


def _hqq(setting: str, group_size: int, axis: int) -> Job:
    return Job("HQQ", setting, "hqq", {"group_size": group_size, "axis": axis}, "hqq", ("hqq.core.quantize",))


def _autoround(setting: str, scheme: str, iters: int, **options: Any) -> Job:
    options = {"scheme": scheme, "iters": iters, **options}
    return Job("AutoRound", setting, "autoround", options, "auto-round", ("auto_round",))


def _torchao(setting: str, group_size: int | None, asymmetric: bool) -> Job:
    options = {"group_size": group_size, "asymmetric": asymmetric}
    return Job("torchao int2", setting, "torchao", options, "torchao", ("torchao.quantization",))


def _llamacpp(setting: str, type: str, **options: Any) -> Job:
    return Job("llama.cpp", setting, "llamacpp", {"type": type, **options}, "llama-cpp-python", ("llama_cpp",))


_A4 = {"ranges": "dynamic", "bits": 4}
_GPTQ: dict[str, Any] = {"method": "gptq", "token_weights": "path_kl"}
_TRELLIS = {"method": "trellis", "bits": 2, "spread": False}
_SPREAD = {"method": "trellis", "bits": 2.17}
_SEQUENTIAL = {"phase": "sequential", "states": "fresh"}
_BLOCKS = {"phase": "blocks", "states": "fresh"}
_NETWORK = {"phase": "path_kl", "what": "network", "states": "fresh"}
_ALL: dict[str, Any] = {"weights": _GPTQ, "training": (_BLOCKS, _NETWORK)}
_WHOLE = PRESETS["best"]

# The settings come from each project's own documentation (its README, recipes and defaults in the pinned version);
# where that leaves the group size open, groups of 128 are the ones nearest to this project's 2.25 bits per weight.
JOBS = (
    _thermo("round-to-nearest", "group 128", weights={"method": "rtn"}),
    _thermo("thermo_lib GPTQ", "group 128", weights={"method": "gptq"}),
    _thermo("thermo_lib GPTQ", "group 128, parameters trained", training=({"phase": "path_kl"},)),
    _thermo("thermo_lib", "all phases", **_ALL),
    _thermo("thermo_lib", "all phases at W2A4", **_ALL, activations=_A4),
    _thermo("thermo_lib", "all phases, group = row", **{**_ALL, "weights": {**_GPTQ, "group_size": 768}}),
    _thermo("thermo_lib", "transition Hessian", weights=_GPTQ),
    _thermo(
        "thermo_lib", "transition Hessian, blocks on calibration states", weights=_GPTQ, training=({"phase": "blocks"},)
    ),
    _thermo("thermo_lib", "transition Hessian, blocks", weights=_GPTQ, training=(_BLOCKS,)),
    _thermo("thermo_lib", "transition Hessian, network", weights=_GPTQ, training=(_NETWORK,)),
    _thermo("thermo_lib trellis", "2 bits a column", weights=_TRELLIS),
    _thermo("thermo_lib trellis", "spread bits", weights=_SPREAD),
    _thermo("thermo_lib trellis", "spread bits, sequential", weights=_SPREAD, training=(_SEQUENTIAL,)),
    _thermo("thermo_lib trellis", "spread bits, network", weights=_SPREAD, training=(_NETWORK,)),
    _thermo(
        "thermo_lib trellis",
        "spread bits, network, half own chains",
        weights=_SPREAD,
        training=({**_NETWORK, "own_share": 0.5},),
    ),
    _thermo(
        "thermo_lib trellis",
        "spread bits, network, own chains",
        weights=_SPREAD,
        training=({**_NETWORK, "own_share": 1.0},),
    ),
    _thermo("thermo_lib trellis", "all phases", **_WHOLE),
    _thermo("thermo_lib trellis", "all phases, below 2.1 bits", **PRESETS["small"]),
    _thermo("thermo_lib trellis", "all phases at W2A4", **PRESETS["w2a4"]),
    _hqq("group 16, axis 0", 16, 0),
    _hqq("group 64, axis 0", 64, 0),
    _hqq("group 64, axis 1", 64, 1),
    _hqq("group 128, axis 0", 128, 0),
    _hqq("group 128, axis 1", 128, 1),
    Job("quanto qint2", "default, group 128", "quanto", {}, "optimum-quanto", ("optimum.quanto",)),
    Job(
        "quanto qint2", "HQQ optimizer", "quanto", {"optimizer": "HqqOptimizer"}, "optimum-quanto", ("optimum.quanto",)
    ),
    _torchao("default, per channel, symmetric", None, False),
    _torchao("group 32, asymmetric", 32, True),
    _torchao("group 128, asymmetric", 128, True),
    _llamacpp("Q2_K", "q2_K"),
    _llamacpp("Q2_K, imatrix", "q2_K", imatrix=True),
    _llamacpp("Q2_K mixture, imatrix", "q2_K", imatrix=True, mixture=True),
    _llamacpp("IQ2_XXS, imatrix", "iq2_xxs", imatrix=True),
    _llamacpp("IQ2_XS, imatrix", "iq2_xs", imatrix=True),
    _llamacpp("IQ2_S, imatrix", "iq2_s", imatrix=True),
    _gptqmodel("default, symmetric, group 128", group_size=128),
    _gptqmodel("asymmetric, group 128", group_size=128, sym=False),
    _gptqmodel("asymmetric, mse 2.4, group 128", group_size=128, sym=False, mse=2.4),
    _gptqmodel("asymmetric, mse 2.4, desc_act, group 128", group_size=128, sym=False, mse=2.4, desc_act=True),
    _gptqmodel("asymmetric, mse 2.4, group 32", group_size=32, sym=False, mse=2.4),
    _autoround("default, W2A16, 200 iterations", "W2A16", 200),
    _autoround("recommended, W2A16, best with alg_ext", "W2A16", 1000, alg_ext=True),
    _autoround("W2A16G64, best with alg_ext", "W2A16G64", 1000, alg_ext=True),
)


# These only; this project's rows of another model are points of its study, which trains some of them for an hour.
OTHERS = tuple(job for job in JOBS if job.adapter != "thermo")


def made_of(job: Job, subject: Subject = REFERENCE) -> str:
    """A digest of what a result depends on: model, calibration, settings and versions."""
    digest = subject.digest()
    versions = [importlib.metadata.version(package) for package in ("torch", *([job.package] if job.package else []))]
    settings = ThermoConfig(**job.options).digest() if job.adapter == "thermo" else {}
    digest.update(json.dumps([asdict(job), versions, settings], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _status(key: str) -> int:
    """A memory figure of this process in KiB, e.g. ``VmHWM``, the peak of its resident memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def quantize(job: Job, subject: Subject = REFERENCE) -> None:
    """Run one job in this process and write its files, the JSON last."""
    torch.manual_seed(0)
    lm = subject.load()
    calibration = subject.calibration(lm)
    for module in job.modules:
        importlib.import_module(module)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before, start = _status("VmRSS"), time.perf_counter()
    layers = ADAPTERS[job.adapter](lm, calibration, **job.options)
    seconds, peak = time.perf_counter() - start, _status("VmHWM") - before
    linears = {name: layer for name, layer in layers.items() if layer.bits is not None}
    tensors = {f"{name}.weight" if name in linears else name: layer.weight for name, layer in layers.items()}
    with replacing(subject.folder / f"{job.name}.safetensors") as new:
        save_file({name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}, new)
    stored = sum(layer.bits for layer in layers.values() if layer.bits is not None)
    entry = Entry(
        method=job.method,
        setting=job.setting,
        version=importlib.metadata.version(job.package) if job.package else "this project",
        bits_per_weight=stored / sum(x.weight.numel() for x in linears.values()),
        seconds=round(seconds, 2),
        peak_mib=round(peak / 1024, 1),
        made_of=made_of(job, subject),
        activation_clip=(job.options.get("activations") or {}).get("clip", 1.0),
        losses={phase: _means(losses) for phase, losses in layers.losses.items()},
    )
    write_json(subject.folder / f"{job.name}.json", asdict(entry))


def _means(losses: Sequence[float], count: int = LOSS_STEPS) -> list[float]:
    """Of every ``count`` losses."""
    return [round(statistics.fmean(losses[start : start + count]), 4) for start in range(0, len(losses), count)]


def _failure(job: Job, subject: Subject, process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = [line for line in process.stderr.replace("\r", "\n").splitlines() if line.strip()]
    ended = f"ended by signal {-process.returncode}" if process.returncode < 0 else ""
    return {
        "method": job.method,
        "setting": job.setting,
        "error": ended or (lines[-1] if lines else f"exit status {process.returncode}"),
        "made_of": made_of(job, subject),
    }


def _complete(job: Job, subject: Subject) -> bool:
    path = subject.folder / f"{job.name}.json"
    if not path.is_file() or not path.with_suffix(".safetensors").is_file():
        return False
    entry = read_object(path)
    return "error" not in entry and entry.get("made_of") == made_of(job, subject)


def run_all(jobs: Sequence[Job], name: str) -> None:
    """Run the jobs that neither have a complete result nor a row in the report, each in a process of its own.

    Args:
        jobs: peers and settings.
        name: of the model, one of ``SUBJECTS``.
    """
    subject = SUBJECTS[name]
    subject.calibration(subject.load())
    rows = read_report(subject.report, rows=NAMES)["rows"] if subject.report.is_file() else []
    scored = {(row["method"], row["setting"], row["made_of"]) for row in rows}
    wanted = {(job.method, job.setting, made_of(job, subject)): job for job in jobs}
    missing = [job for key, job in wanted.items() if key not in scored and not _complete(job, subject)]
    bar = tqdm(missing, desc="peers", unit="setting", disable=not missing)
    for job in bar:
        bar.set_postfix_str(job.name)
        command = [sys.executable, "-m", "thermo_lib.studies.peers.quantize", "--model", name, "--only", job.name]
        process = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        if process.returncode:
            write_json(subject.folder / f"{job.name}.json", _failure(job, subject, process))


@to_its_end
def main() -> None:
    """Run everything, or with ``--only`` one job or the comparison of the two GPTQs in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[CHECK, *(job.name for job in JOBS)], help="one setting, in this process")
    parser.add_argument("--method", help="only this method's settings, each in its own process")
    parser.add_argument("--model", choices=list(SUBJECTS), default="reference", help="what is quantized")
    arguments = parser.parse_args()
    subject, is_reference = SUBJECTS[arguments.model], arguments.model == "reference"
    if arguments.only == CHECK:
        lm = REFERENCE.load()
        with torch.no_grad():
            write_json(REFERENCE.folder / f"{CHECK}.json", compare_gptq(lm, REFERENCE.calibration(lm)))
    elif arguments.only:
        quantize(next(job for job in JOBS if job.name == arguments.only), subject)
    else:
        with locked(subject.folder):
            jobs = JOBS if is_reference else OTHERS
            run_all([job for job in jobs if arguments.method in (None, job.method)], arguments.model)
            checked = (REFERENCE.folder / f"{CHECK}.json").is_file() or (
                REFERENCE.report.is_file() and read_report(REFERENCE.report, gptq_check={})["gptq_check"]
            )
            if is_reference and arguments.method is None and not checked:
                subprocess.run([sys.executable, "-m", "thermo_lib.studies.peers.quantize", "--only", CHECK], check=True)


if __name__ == "__main__":
    sys.exit(main())
