"""The command line: ``python -m thermo_lib quantize``, ``generate``, ``evaluate``, ``benchmark``, ...

``quantize`` writes a quantized folder, which ``generate`` and ``evaluate`` take as well as a full-precision one.
``benchmark`` asks the project's question about any model without a notebook; it runs the notebooks' code.
``study`` measures the points of the grid behind the notebook ``06_smoothing_study``, ``point`` any single one;
``tidy`` is for the pipeline.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tqdm import tqdm

from thermo_lib.diffusion.sampling import SAMPLERS, generate
from thermo_lib.diffusion.states import calibrate
from thermo_lib.evaluation import report
from thermo_lib.evaluation.scores import build_suite, evaluate, summarize
from thermo_lib.evaluation.smoothing import (
    check_comparable,
    compare_smoothing,
    identity_target,
    overhead_targets,
    same_outputs,
    smoothing_overhead,
)
from thermo_lib.files.folders import output_folder
from thermo_lib.files.tensors import weight_files
from thermo_lib.files.text import write_json, write_text
from thermo_lib.models.lm import DiffusionLM, load_model, model_folder
from thermo_lib.notebooks import reproducible, tidy
from thermo_lib.params import default
from thermo_lib.pipeline.activations import resmooth
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.layerwise import check_layerwise
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import is_quantized, load_any, save_quantized
from thermo_lib.pipeline.streaming import calibration_states, quantize_checkpoint
from thermo_lib.studies.grid import Grid, configuration, point
from thermo_lib.studies.smoothing import COLUMNS, slices, summary
from thermo_lib.time_aware.smoothing import METHODS, WINDOWED

_WITHOUT_DATA = {"quantizer": "least_squares", "activation_bits": 16, "num_time_groups": 1}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m thermo_lib", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    some_model = {"default": "reference", "help": "'reference', a folder or a hub id (%(default)s)"}
    devices = {"help": "e.g. cpu or cuda:1 (the first GPU, if there is one)"}
    dtypes = {"choices": ["float32", "bfloat16"], "default": "float32", "help": "of the computation (%(default)s)"}
    some_fields = {"nargs": "*", "metavar": "NAME=VALUE"}

    writer = commands.add_parser("quantize", help="write a quantized folder")
    writer.add_argument("--model", **some_model)
    writer.add_argument("--output", type=Path, required=True, help="folder; an earlier one is replaced at the end")
    writer.add_argument(
        "--layerwise",
        type=int,
        metavar="STATES",
        help="calibrate block by block in little memory, on so many states of the forward process (the model as a "
        "whole, on its own trajectories)",
    )
    writer.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a dask cluster, e.g. tcp://host:8786, or 'local' for one of processes",
    )
    without_data = " ".join(f"{name}={value}" for name, value in _WITHOUT_DATA.items())
    writer.add_argument("fields", **some_fields, help=f"of ThermoConfig ({without_data}, else as in params.yaml)")

    teller = commands.add_parser("generate", help="let a model, full precision or quantized, continue a text")
    teller.add_argument("--model", **some_model)
    teller.add_argument("--prompt", required=True, help="the text")
    teller.add_argument("--chat", action="store_true", help="the prompt is a user's message to an instruct model")
    teller.add_argument("--max-new-tokens", type=int, default=64, help="tokens to fill (%(default)s)")
    teller.add_argument("--timesteps", type=int, default=64, help="denoising steps (%(default)s)")
    teller.add_argument("--sampler", choices=SAMPLERS, default="entropy", help="which tokens first (%(default)s)")
    teller.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    teller.add_argument("--top-p", type=float, help="of the probability that tokens are drawn from")
    teller.add_argument("--top-k", type=int, help="tokens that are drawn from")
    teller.add_argument("--alg-temp", type=float, default=0.0, help="of the choice of positions (%(default)s)")
    teller.add_argument("--block-length", type=int, help="fill blocks of so many tokens, left to right")
    teller.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts (%(default)s)")
    teller.add_argument("--dtype", **dtypes)
    teller.add_argument("--device", **devices)

    judge = commands.add_parser("evaluate", help="accuracy, NELBO and path KL of a model, full precision or quantized")
    judge.add_argument("--model", **some_model)
    judge.add_argument("--reference", help="the full-precision model that a quantized one was made from")
    judge.add_argument("--timesteps", type=int, default=default("quant.timesteps"), help="T (%(default)s)")
    judge.add_argument("--output", type=Path, help="JSON file of the scores")
    judge.add_argument("--dtype", **dtypes)
    judge.add_argument("--device", **devices)

    benchmark = commands.add_parser("benchmark", help="compare a model quantized with and without smoothing")
    which = benchmark.add_mutually_exclusive_group()
    which.add_argument("--all-methods", action="store_true", help="linear, cubic and sigmoid (default)")
    which.add_argument("--smoothing-method", choices=list(METHODS), help="only this smoothing method")
    benchmark.add_argument("--model", **some_model)
    benchmark.add_argument("--bits", type=int, default=default("quant.bit_width"), help="weight bits (%(default)s)")
    benchmark.add_argument(
        "--activation-bits", type=int, default=default("quant.activation_bits"), help="16 for none (%(default)s)"
    )
    for flag, key in (
        ("--quantizer", "quantizer"),
        ("--group-size", "group_size"),
        ("--timesteps", "timesteps"),
        ("--num-time-groups", "num_time_groups"),
        ("--smoothing-window", "smoothing_window"),
    ):
        value = default(f"quant.{key}")
        benchmark.add_argument(flag, type=type(value), default=value, help=f"{key} (%(default)s)")
    benchmark.add_argument("--output", type=Path, default=Path("artifacts/benchmark"), help="folder (%(default)s)")

    grid = commands.add_parser("study", help="measure the points of the smoothing study that are still missing")
    grid.add_argument("--axes", choices=["reduced", "full"], default="reduced", help="section of params.yaml")
    grid.add_argument("--output", type=Path, required=True, help="JSON file of the points; what it holds is kept")

    single = commands.add_parser("point", help="measure one configuration of the smoothing study")
    single.add_argument("fields", **some_fields, help="e.g. activation_bits=4 method=linear")
    single.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration data (%(default)s)")
    single.add_argument(
        "--output", type=Path, default=Path("artifacts/points.json"), help="JSON file of points (%(default)s)"
    )

    cleaner = commands.add_parser("tidy", help="remove run times and progress bars from an executed notebook")
    cleaner.add_argument("notebook", type=Path)
    return parser


def _read_fields(command: str, words: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """Names and values of ``NAME=VALUE`` words."""
    fields = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in allowed:
            raise ValueError(f"{command}: found {word!r}, expected NAME=VALUE, NAME one of {', '.join(allowed)}")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}: found {value!r}, expected a number, a word or null") from error
    return fields


def _load(name: str, arguments: argparse.Namespace) -> DiffusionLM:
    """A model, full precision or quantized, on the device asked for.

    Raises:
        ValueError: there is no such device, or what loading the model raises.
    """
    wanted = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: found {wanted!r} ({reason}), allowed is cpu, or a GPU of this machine") from error
    lm = load_any(name, dtype=getattr(torch, arguments.dtype))
    lm.model.to(wanted)
    return lm


@contextmanager
def cluster_client(address: str) -> Iterator[Any]:
    """A client of the ``dask.distributed`` cluster at an address, or of a local one with a process for each core.

    Raises:
        OSError: no scheduler answers there.
    """
    from distributed import Client, LocalCluster

    if address == "local":
        with LocalCluster(threads_per_worker=1) as cluster, Client(cluster) as client:
            yield client
    else:
        try:
            client = Client(address, timeout="10s")
        except (ValueError, OSError) as error:
            raise OSError(f"scheduler: found no dask scheduler at {address!r} ({error})") from error
        with client:
            yield client


def run_quantize(arguments: argparse.Namespace) -> None:
    """Quantize a checkpoint: tensor by tensor, block by block, or as a whole."""
    config = ThermoConfig(**_WITHOUT_DATA | _read_fields("quantize", arguments.fields, list(ThermoConfig.model_fields)))
    if is_quantized(arguments.model):
        raise ValueError(f"model: found {arguments.model!r}, which is quantized, allowed is a full-precision model")
    if arguments.scheduler is not None and config.needs_calibration:
        found = f"found {arguments.scheduler!r} with quantizer={config.quantizer!r}, "
        found += f"num_time_groups={config.num_time_groups}, activation_bits={config.activation_bits}"
        raise ValueError(f"scheduler: {found}; allowed is what needs no calibration: rtn or least_squares, one group")
    start = time.perf_counter()
    if arguments.layerwise is not None:
        if not config.needs_calibration:
            raise ValueError(f"layerwise: found quantizer={config.quantizer!r}, which needs no calibration states")
        check_layerwise(config)
        calibration = calibration_states(arguments.model, config.timesteps, arguments.layerwise, default("seed"))
        quantize_checkpoint(arguments.model, arguments.output, config, calibration, progress=True)
    elif config.needs_calibration:
        output_folder(arguments.output, model_folder(arguments.model))  # refuses a wrong one before the work
        reproducible()
        lm = load_model(arguments.model)
        calibration = calibrate(lm, timesteps=config.timesteps)
        save_quantized(quantize(lm, config, calibration, progress=True), arguments.output)
    elif arguments.scheduler is not None:
        with cluster_client(arguments.scheduler) as client:
            print(f"dashboard: {client.dashboard_link}")
            quantize_checkpoint(arguments.model, arguments.output, config, client=client, progress=True)
    else:
        quantize_checkpoint(arguments.model, arguments.output, config, progress=True)
    size = sum(path.stat().st_size for path in weight_files(arguments.output))
    print(f"{arguments.output}: {size / 1e6:.1f} MB of weights in {time.perf_counter() - start:.0f} s")


def run_generate(arguments: argparse.Namespace) -> None:
    """Print a model's continuation of a text, up to the first special token."""
    if arguments.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens: found {arguments.max_new_tokens}, allowed is at least 1")
    lm = _load(arguments.model, arguments)
    text = lm.chat([{"role": "user", "content": arguments.prompt}]) if arguments.chat else arguments.prompt
    prompt = lm.tokenizer.encode(text, add_special_tokens=not arguments.chat).ids
    filled = generate(
        lm,
        torch.tensor([prompt + [lm.mask_token_id] * arguments.max_new_tokens]),
        timesteps=arguments.timesteps,
        sampler=arguments.sampler,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        alg_temp=arguments.alg_temp,
        block_length=arguments.block_length,
        seed=arguments.seed,
        progress="generate",
    )
    print(lm.decode(filled[0, len(prompt) :]))


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Print a model's scores on the project's held-out code, against the full-precision model's trajectories."""
    quantized = is_quantized(arguments.model)
    if quantized and arguments.reference is None:
        raise ValueError(
            "reference: found none, expected the full-precision model that the quantized one was made from"
        )
    reproducible()
    lm = _load(arguments.model, arguments)
    reference = lm if arguments.reference is None else _load(arguments.reference, arguments)
    if reference.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise ValueError(f"reference: found a model with another vocabulary than {arguments.model!r} has")
    suite = build_suite(reference, timesteps=arguments.timesteps, progress=True)
    row = summarize(arguments.model, lm, evaluate(lm, suite, progress=True))
    if arguments.output is not None:
        write_json(arguments.output, row)
    print(report.table([row]))


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Quantize, smooth, evaluate and write ``report.json``, ``report.txt`` and ``timings.json``."""
    config = ThermoConfig(
        bit_width=arguments.bits,
        activation_bits=arguments.activation_bits,
        quantizer=arguments.quantizer,
        group_size=arguments.group_size,
        timesteps=arguments.timesteps,
        num_time_groups=arguments.num_time_groups,
        smoothing_window=arguments.smoothing_window,
        enable_boundary_smoothing=False,
    )
    check_comparable(config)
    methods = [arguments.smoothing_method] if arguments.smoothing_method else list(WINDOWED)
    reproducible()
    with tqdm(total=5, desc="benchmark", unit="stage") as bar:
        lm = load_model(arguments.model)
        calibration = calibrate(lm, timesteps=config.timesteps)
        bar.update()
        suite = build_suite(lm, timesteps=config.timesteps, progress=True)
        full_precision = summarize("full precision", lm, evaluate(lm, suite, progress=True))
        bar.update()
        unsmoothed = quantize(lm, config, calibration, progress=True)
        bar.update()
        rows, targets, models = compare_smoothing(unsmoothed, suite, methods, progress=True)
        same = same_outputs(resmooth(models[methods[-1]], None), unsmoothed, suite)
        targets.append(identity_target(same, config))
        bar.update()
        timings = smoothing_overhead(unsmoothed, calibration, suite, methods[0], progress=True)
        targets += overhead_targets(timings, config, methods[0])
        bar.update()
    content = report.build_report(arguments.model, full_precision, rows, targets)
    write_json(arguments.output / "report.json", content)
    write_json(arguments.output / "timings.json", timings)
    write_text(arguments.output / "report.txt", report.report_text(content))
    print(report.report_text(content))


def run_study(arguments: argparse.Namespace) -> None:
    """Measure a grid; a run that was stopped goes on."""
    reproducible()
    grid = Grid(arguments.output, load_model("reference"))
    grid.run(p for points in slices(default(f"study.{arguments.axes}")).values() for p in points)


def run_point(arguments: argparse.Namespace) -> None:
    """Measure one configuration and print its scores, averaged over the seeds."""
    fields = _read_fields("point", arguments.fields, ["method", "recipe", *ThermoConfig.model_fields])
    points = [point(seed, **fields) for seed in arguments.seeds]
    for p in points:
        configuration(p)  # refuses a wrong value before any work
    reproducible()
    grid = Grid(arguments.output, load_model("reference"))
    grid.run(points)
    name = " ".join(arguments.fields)
    print(report.table(summary(grid, {name: fields}, arguments.seeds, name), COLUMNS))


_RUN = {
    "quantize": run_quantize,
    "generate": run_generate,
    "evaluate": run_evaluate,
    "benchmark": run_benchmark,
    "study": run_study,
    "point": run_point,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on a wrong value, with the reason on stderr."""
    transformers.logging.set_verbosity_error()
    try:
        arguments = _parser().parse_args(argv)
        if arguments.command == "tidy":
            tidy(arguments.notebook)
        else:
            _RUN[arguments.command](arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
