"""What the commands of ``python -m thermo_lib`` do."""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from thermo_lib.chat import Chat, check_system, converse
from thermo_lib.data.texts import read_texts
from thermo_lib.diffusion.rules import TokenRules
from thermo_lib.diffusion.sampling import generate
from thermo_lib.diffusion.states import Calibration, calibrate, text_batches
from thermo_lib.diffusion.tokens import Sampling, chosen_sampler
from thermo_lib.evaluation import report
from thermo_lib.evaluation.comparison import per_sequence
from thermo_lib.evaluation.page import BEGINS, report_page
from thermo_lib.evaluation.results import read_report_json
from thermo_lib.evaluation.scores import Suite, build_suite, evaluate
from thermo_lib.evaluation.smoothing import (
    check_comparable,
    compare_smoothing,
    identity_target,
    overhead_targets,
    same_outputs,
    smoothing_overhead,
)
from thermo_lib.evaluation.summary import summarize
from thermo_lib.files.outputs import alone_in, alone_in_folder, output_file
from thermo_lib.files.tensors import weight_files
from thermo_lib.files.text import as_json, write_json, write_text
from thermo_lib.files.whole import replacing_together, sweep_together
from thermo_lib.models.lm import DiffusionLM, load_model, model_folder, stored_dtype
from thermo_lib.models.streamed import load_streamed
from thermo_lib.models.tokenizer_json import encode, left_open
from thermo_lib.notebooks import reproducible
from thermo_lib.pipeline.about import about, described, words
from thermo_lib.pipeline.activations import resmooth, resmoothed
from thermo_lib.pipeline.cluster import cluster_client
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.model import QuantizedLM, dequantized
from thermo_lib.pipeline.presets import DEFAULT
from thermo_lib.pipeline.quantize import quantize
from thermo_lib.pipeline.storage import is_quantized, load_any, save_quantized
from thermo_lib.pipeline.streaming import quantize_checkpoint
from thermo_lib.quant.precision import FLOAT32, TF32, products_in
from thermo_lib.studies import gpu
from thermo_lib.studies.grid import Grid, point, preset_fields
from thermo_lib.studies.params import default, grid_inputs
from thermo_lib.studies.smoothing import SUMMARY_COLUMNS, printed_if_lost, slices, summary
from thermo_lib.studies.speed import GPU_COLUMNS, SPEED_COLUMNS, kernel_speeds, write_speeds
from thermo_lib.time_aware.smoothing import WINDOWED
from thermo_lib.usage import keep_and_tell, tell


def device_of(asked: str | None) -> str:
    """The device asked for, or the first GPU if there is one; raises ValueError where there is none of that name."""
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if asked is None else asked
    try:
        if torch.empty(0, device=wanted).is_meta:
            raise RuntimeError("which holds no numbers")
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: found {wanted!r} ({reason}), allowed is cpu, or a GPU of this machine") from error
    return wanted


def kind_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``load_model`` takes where a model's files don't say what it is."""
    return {"family": arguments.family, "block_length": arguments.attention_block}


def load(name: str, arguments: argparse.Namespace) -> DiffusionLM:
    """A model, full precision or quantized, on the device asked for.

    Raises:
        ValueError: there is no such device, or what loading the model raises.
    """
    device = device_of(arguments.device)
    kind = {} if is_quantized(name) else kind_of(arguments)
    dtype = stored_dtype(name, **kind) if arguments.dtype == "stored" else getattr(torch, arguments.dtype)
    lm = load_any(name, dtype=dtype, progress=True, **kind)
    lm.model.to(device)
    return lm


def computing_model(lm: DiffusionLM, arguments: argparse.Namespace) -> DiffusionLM:
    """The model that computes: with ``--dense`` one with the plain weights that a quantized one stands for.

    Raises:
        ValueError: a full-precision model with ``--dense``, or what ``dequantized`` raises.
    """
    if not arguments.dense:
        return lm
    if not isinstance(lm, QuantizedLM):
        raise ValueError(f"dense: found {arguments.model!r}, which isn't quantized, allowed is a quantized model")
    return dequantized(lm)


def check_texts(path: Path) -> None:
    """Refuse a file that can't be read as text before a model is loaded, whose template then writes conversations."""
    read_texts(path, lambda messages: "\n".join(message["content"] for message in messages))


def _own_texts(lm: DiffusionLM, path: Path) -> list[str]:
    """The texts of a user's file, conversations by the model's template."""
    render = None if lm.chat_template is None else lambda messages: lm.chat(messages, add_generation_prompt=False)
    return read_texts(path, render)


def _own_batches(lm: DiffusionLM, arguments: argparse.Namespace, seed: int) -> list[tuple[Tensor, Tensor | None]]:
    """Calibration text from the file that was named."""
    size = _given(arguments, "sequences", "length")
    return text_batches(lm, _own_texts(lm, arguments.calibration), seed=seed, **size)


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of some arguments that were given."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def calibration_states(lm: DiffusionLM, config: ThermoConfig, arguments: argparse.Namespace) -> Calibration:
    """Calibration states of the project's text, or of the file that was named."""
    own: dict[str, Any] = {} if arguments.calibration is None else {"batches": _own_batches(lm, arguments, config.seed)}
    return calibrate(lm, timesteps=config.timesteps, seed=config.seed, **own)


def run_quantize(arguments: argparse.Namespace) -> None:
    """Quantize a checkpoint: tensor by tensor, block by block, or as a whole."""
    fields = dict(arguments.settings)
    config = ThermoConfig.preset(fields.pop("preset", DEFAULT), **fields)
    if is_quantized(arguments.model):
        raise ValueError(f"model: found {arguments.model!r}, which is quantized, allowed is a full-precision model")
    if arguments.calibration is not None and not config.needs_calibration:
        found = f"found {str(arguments.calibration)!r} with weights.method={config.quantizer!r}"
        raise ValueError(f"calibration: {found}, which needs none")
    if arguments.calibration is None and (arguments.sequences, arguments.length) != (None, None):
        raise ValueError("sequences, length: found a size without --calibration, allowed is a size of a file's text")
    if arguments.scheduler is not None and config.needs_calibration:
        found = f"found {arguments.scheduler!r} with {config.needs_calibration}"
        raise ValueError(f"scheduler: {found}; allowed is what needs no calibration, such as preset=fast")
    if arguments.calibration is not None:
        check_texts(arguments.calibration)
    device = "cpu" if arguments.scheduler is not None and arguments.device is None else device_of(arguments.device)
    start = time.perf_counter()
    source = model_folder(arguments.model)
    with alone_in_folder(arguments.output, source), products_in(FLOAT32 if arguments.float32 else TF32):
        _quantize(arguments, config, device)
    size = sum(path.stat().st_size for path in weight_files(arguments.output))
    peak = ""
    if torch.device(device).type == "cuda":
        peak = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory at most"
    seconds = time.perf_counter() - start
    content = {"output": str(arguments.output), "megabytes": size / 1e6, "seconds": seconds, "quantized": words(config)}
    tell(arguments, f"{arguments.output}: {size / 1e6:.1f} MB of weights in {seconds:.0f} s{peak}", content)


def _quantize(arguments: argparse.Namespace, config: ThermoConfig, device: str) -> None:
    """Write the folder, in the way that was asked for."""
    how = {**kind_of(arguments), "device": device, "progress": True}
    write = partial(quantize_checkpoint, arguments.model, arguments.output, config, **how)
    if arguments.layerwise is not None:
        if not config.needs_calibration:
            raise ValueError(f"layerwise: found weights.method={config.quantizer!r}, which needs no calibration states")
        reproducible()
        lm: DiffusionLM = load_streamed(arguments.model, **kind_of(arguments), device=device)
        calibration = calibration_states(lm, config, arguments)
        if arguments.layerwise != "all":
            calibration = calibration.thinned(int(arguments.layerwise))
        write(calibration=calibration)
    elif config.needs_calibration:
        reproducible()
        lm = load_model(arguments.model, progress=True, **kind_of(arguments))
        lm.model.to(device)
        save_quantized(quantize(lm, config, calibration_states(lm, config, arguments), progress=True), arguments.output)
    elif arguments.scheduler is not None:
        with cluster_client(arguments.scheduler) as client:
            print(f"dashboard: {client.dashboard_link}", file=sys.stderr if arguments.json else sys.stdout)
            write(client=client)
    else:
        write()


def run_info(arguments: argparse.Namespace) -> None:
    """Print what a model folder holds."""
    lines = described(found := about(arguments.model, **kind_of(arguments)))
    width = max(map(len, lines))
    tell(arguments, "\n".join(f"{title:{width}}  {text}" for title, text in lines.items()), found)


def run_generate(arguments: argparse.Namespace) -> None:
    """Print a model's continuation of a text, up to the first special token."""
    how = _sampling(arguments)
    lm = computing_model(load(arguments.model, arguments), arguments)
    text = lm.chat([{"role": "user", "content": arguments.prompt}]) if arguments.chat else arguments.prompt
    (encoded,) = encode(lm.tokenizer, [text], add_special_tokens=not arguments.chat)
    prompt, end = left_open(encoded)
    filled = generate(
        lm,
        torch.tensor([prompt + [lm.mask_token_id] * arguments.max_new_tokens + end]),
        progress="generate",
        **how,
    )
    tokens = filled[0, len(prompt) :][: arguments.max_new_tokens]
    content = {
        "model": arguments.model,
        "prompt": arguments.prompt,
        "text": lm.decode(tokens),
        "tokens": tokens.tolist(),
    }
    tell(arguments, content["text"], content)


def run_chat(arguments: argparse.Namespace) -> None:
    """Answer what a user says, line after line."""
    how = _sampling(arguments)
    check_system(arguments.raw, arguments.system)
    with suppress(KeyboardInterrupt):
        lm = computing_model(load(arguments.model, arguments), arguments)
        converse(Chat(lm, arguments.max_new_tokens, how, arguments.system, arguments.raw))


_SAMPLING = ("sampler", "temperature", "top_p", "top_k", "alg_temp", "threshold", "timesteps", "block_length", "seed")
_RULES = ("suppress_tokens", "begin_suppress_tokens", "end_tokens", "suppress_end", "end_last", "stop_at_end")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the library's ``generate`` that commands have too; raises ValueError for a wrong value."""
    how = {name: getattr(arguments, name) for name in (*_SAMPLING, *_RULES)}
    how["sampler"] = chosen_sampler(how["sampler"], how["threshold"])
    Sampling(**{name: how[name] for name in _SAMPLING[:6]})
    TokenRules(**{name: how[name] for name in _RULES})
    return how


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Print a model's scores on the project's held-out code, against the full-precision model's trajectories."""
    quantized = is_quantized(arguments.model)
    if quantized and arguments.reference is None:
        raise ValueError(
            "reference: found none, expected the full-precision model that the quantized one was made from"
        )
    if arguments.data is not None:
        check_texts(arguments.data)
    with alone_in(arguments.output, ["name", "accuracy"]):
        reproducible()
        lm = load(arguments.model, arguments)
        computing = computing_model(lm, arguments)
        reference = lm if arguments.reference is None else load(arguments.reference, arguments)
        if reference.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise ValueError(f"reference: found a model with another vocabulary than {arguments.model!r} has")
        row = scores(arguments.model, lm, computing, inputs(reference, arguments))
        write = None if arguments.output is None else partial(write_json, arguments.output, row)
        keep_and_tell(arguments, report.table([row]), row, write)


def inputs(reference: DiffusionLM, arguments: argparse.Namespace) -> Suite:
    """What models are scored on: the project's held-out code, or the file that was named."""
    given = _given(arguments, "sequences", "trajectories", "length")
    given |= {} if arguments.data is None else {"texts": _own_texts(reference, arguments.data), "sudoku": 0}
    return build_suite(reference, timesteps=arguments.timesteps, progress=True, **given)


def scores(name: str, lm: DiffusionLM, computing: DiffusionLM, suite: Suite) -> dict[str, Any]:
    """A model's row of scores, with what a paired comparison needs (``sequences``)."""
    found = evaluate(computing, suite, progress=True)
    return summarize(name, lm, found) | {"sequences": per_sequence(found, suite)}


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Quantize, smooth, evaluate and write ``report.json``, ``report.txt`` and ``timings.json``."""
    config = _benchmarked(arguments)
    check_comparable(config)
    methods = [arguments.smoothing_method] if arguments.smoothing_method else list(WINDOWED)
    for method in methods:
        resmoothed(config, method, arguments.smoothing_window)  # refuses a wrong window before the work
    with alone_in(arguments.output / "report.json", ["configurations", "targets"]):
        folder = Path(os.path.realpath(arguments.output))
        _check_reports(folder)
        content, timings = _benchmark(arguments, config, methods)
        text = report.report_text(content)
        texts = {"report.json": as_json(content), "report.txt": text, "timings.json": as_json(timings)}
        keep_and_tell(arguments, text, content, partial(_write_reports, folder, texts))


def _write_reports(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files of a benchmark: all, or none."""
    with replacing_together(folder) as new:
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")


_FLAGS = {"bits": "bit_width"}  # options of ``benchmark`` whose field has another name
_BENCHMARK = {"bits": 2, "activation_bits": 16, "quantizer": "gptq", "group_size": 128, "timesteps": 16}


def _benchmarked(arguments: argparse.Namespace) -> ThermoConfig:
    """The configuration that is compared with and without smoothing: of options, or a preset and what differs from it.

    Raises:
        ValueError: a wrong setting, or one that is given by an option and by a word.
    """
    words = dict(arguments.settings)
    given = _given(arguments, *_BENCHMARK, "num_time_groups")
    if not words:
        given = _BENCHMARK | {"num_time_groups": 3} | given
    elif "num_time_groups" not in words and "time_groups.count" not in words:
        given = {"num_time_groups": 3} | given
    fields = {_FLAGS.get(name, name): value for name, value in given.items()} | {"enable_boundary_smoothing": False}
    if twice := sorted(fields.keys() & words.keys()):
        raise ValueError(f"{twice[0]}: found it as an option and as a word, allowed is one of them")
    if not words:
        return ThermoConfig(**fields)
    return ThermoConfig.preset(words.pop("preset", DEFAULT), **words, **fields)


def _check_reports(folder: Path) -> None:
    """Refuse before the work files of other names that aren't those of a benchmark, and finish what a killed one began.

    Raises:
        ValueError: a file without ``report.json``, or what ``output_file`` raises.
    """
    sweep_together(folder)
    for name in ("report.txt", "timings.json"):
        if output_file(folder / name).exists() and not (folder / "report.json").exists():
            raise ValueError(f"output: found {name} without report.json in {folder}, allowed are both or neither")


def _benchmark(
    arguments: argparse.Namespace, config: ThermoConfig, methods: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report and the timings."""
    reproducible()
    with tqdm(total=5, desc="benchmark", unit="stage") as bar:
        lm = load_model(arguments.model, progress=True, **kind_of(arguments))
        calibration = calibrate(lm, timesteps=config.timesteps)
        bar.update()
        suite = build_suite(lm, timesteps=config.timesteps, progress=True)
        full_precision = summarize("full precision", lm, evaluate(lm, suite, progress=True))
        bar.update()
        unsmoothed = quantize(lm, config, calibration, progress=True)
        bar.update()
        rows, targets, models = compare_smoothing(
            unsmoothed, suite, methods, window=arguments.smoothing_window, progress=True
        )
        same = same_outputs(resmooth(models[methods[-1]], None), unsmoothed, suite)
        targets.append(identity_target(same, config))
        bar.update()
        timings = smoothing_overhead(unsmoothed, calibration, suite, methods[0], progress=True)
        targets += overhead_targets(timings, config, methods[0])
        bar.update()
    return report.build_report(arguments.model, full_precision, rows, targets), timings


def run_study(arguments: argparse.Namespace) -> None:
    """Measure a grid; a run that was stopped goes on."""
    reproducible()
    points = [p for points in slices(default(f"study.{arguments.axes}")).values() for p in points]
    inputs = grid_inputs()  # a wrong file is refused before the work
    grid = Grid(arguments.output, load_model("reference"), inputs)
    with printed_if_lost(grid):
        grid.run(points)


def run_point(arguments: argparse.Namespace) -> None:
    """Measure one configuration and print its scores, averaged over the seeds."""
    fields = arguments.settings
    if "seed" in fields:
        raise ValueError(f"seed: found {fields['seed']!r}, allowed is --seeds {fields['seed']!r}")
    fields = preset_fields(fields)  # refuses a wrong setting before the work
    points = [point(seed, **fields) for seed in arguments.seeds]
    reproducible()
    grid = Grid(arguments.output, load_model("reference"))
    with printed_if_lost(grid):
        grid.run(points)
    name = " ".join(arguments.fields)
    rows = summary(grid, {name: fields}, arguments.seeds, name)
    tell(arguments, report.table(rows, SUMMARY_COLUMNS), {"rows": rows})


def run_report(arguments: argparse.Namespace) -> None:
    """Make one HTML page of what ``benchmark`` or the pipeline wrote."""
    with alone_in(arguments.output, begins=BEGINS):
        write_text(arguments.output, report_page(read_report_json(arguments.report)))
    if arguments.json:
        tell(arguments, "", {"report": str(arguments.report), "output": str(arguments.output)})


def run_speed(arguments: argparse.Namespace) -> None:
    """Time products from codes against dense ones, print the report and write it."""
    with alone_in(arguments.output, ["processor", "rows"]):
        rows = kernel_speeds(tokens=arguments.tokens, rounds=arguments.rounds, progress=True)
        write = partial(write_speeds, arguments.output, rows)
        keep_and_tell(arguments, report.table(rows, SPEED_COLUMNS), {"rows": rows}, write)


def run_gpu_check(arguments: argparse.Namespace) -> None:
    """Check and time the kernels, models and quantizers on a GPU, write the report and print it."""
    device = torch.device(device_of(arguments.device))
    if device.type != "cuda" and arguments.device is None:
        raise ValueError("device: found no GPU, allowed is --device cpu to try the command out")
    extent = gpu.QUICK if arguments.quick else gpu.WHOLE
    found: dict[str, Any] = {}
    with alone_in(arguments.output, ["card", "failed"]):
        try:
            gpu.gpu_check(device, extent, arguments.output, found=found, progress=True)
        finally:  # also where the disk doesn't take it
            for name in gpu.PARTS:
                if found.get(name):
                    print(f"\n{name}\n{report.table(found[name], GPU_COLUMNS[name])}")
            for name, reason in found.get("failed", {}).items():
                print(f"{name}: {reason}")


def run(arguments: argparse.Namespace) -> None:
    """Run the command that was parsed; raises ValueError or OSError with the reason on one line."""
    transformers.logging.set_verbosity_error()
    commands = {
        "quantize": run_quantize,
        "info": run_info,
        "generate": run_generate,
        "chat": run_chat,
        "evaluate": run_evaluate,
        "benchmark": run_benchmark,
        "study": run_study,
        "point": run_point,
        "report": run_report,
        "speed": run_speed,
        "gpu-check": run_gpu_check,
    }
    commands[arguments.command](arguments)
