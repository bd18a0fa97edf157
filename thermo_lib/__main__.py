"""The command line: ``python -m thermo_lib benchmark``, ``study``, ``point`` and ``tidy``.

``benchmark`` asks the project's question about any model without a notebook; it runs the notebooks' code.
``study`` measures the points of the grid behind the notebook ``06_smoothing_study``, ``point`` any single one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
import yaml
from tqdm import tqdm

from thermo_lib import report
from thermo_lib.calibration import calibrate
from thermo_lib.config import ThermoConfig
from thermo_lib.evaluation import (
    build_suite,
    check_comparable,
    compare_smoothing,
    evaluate,
    identity_target,
    overhead_targets,
    same_outputs,
    smoothing_overhead,
    summarize,
)
from thermo_lib.models import load_model
from thermo_lib.notebooks import reproducible, tidy
from thermo_lib.params import default
from thermo_lib.quantized_model import quantize, resmooth
from thermo_lib.study import COLUMNS, Grid, configuration, point, slices, summary
from thermo_lib.time_aware import METHODS, WINDOWED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m thermo_lib", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    benchmark = commands.add_parser("benchmark", help="compare a model quantized with and without smoothing")
    which = benchmark.add_mutually_exclusive_group()
    which.add_argument("--all-methods", action="store_true", help="linear, cubic and sigmoid (default)")
    which.add_argument("--smoothing-method", choices=list(METHODS), help="only this smoothing method")
    benchmark.add_argument("--model", default="reference", help="'reference', a folder or a hub id (%(default)s)")
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
    single.add_argument("fields", nargs="*", metavar="NAME=VALUE", help="e.g. activation_bits=4 method=linear")
    single.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration data (%(default)s)")
    single.add_argument(
        "--output", type=Path, default=Path("artifacts/points.json"), help="JSON file of points (%(default)s)"
    )

    cleaner = commands.add_parser("tidy", help="remove run times and progress bars from an executed notebook")
    cleaner.add_argument("notebook", type=Path)
    return parser


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
    report.write_json(arguments.output / "report.json", content)
    report.write_json(arguments.output / "timings.json", timings)
    report.write_text(arguments.output / "report.txt", report.report_text(content))
    print(report.report_text(content))


def run_study(arguments: argparse.Namespace) -> None:
    """Measure a grid; a run that was stopped goes on."""
    reproducible()
    grid = Grid(arguments.output, load_model("reference"))
    grid.run(p for points in slices(default(f"study.{arguments.axes}")).values() for p in points)


def run_point(arguments: argparse.Namespace) -> None:
    """Measure one configuration and print its scores, averaged over the seeds."""
    fields = {}
    for word in arguments.fields:
        name, equals, value = word.partition("=")
        allowed = ["method", "recipe", *ThermoConfig.model_fields]
        if not equals or name not in allowed:
            raise ValueError(f"point: found {word!r}, expected NAME=VALUE, NAME one of {', '.join(allowed)}")
        fields[name] = yaml.safe_load(value)
    points = [point(seed, **fields) for seed in arguments.seeds]
    for p in points:
        configuration(p)  # refuses a wrong value before any work
    reproducible()
    grid = Grid(arguments.output, load_model("reference"))
    grid.run(points)
    name = " ".join(arguments.fields)
    print(report.table(summary(grid, {name: fields}, arguments.seeds, name), COLUMNS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on a wrong value, with the reason on stderr."""
    transformers.logging.set_verbosity_error()
    try:
        arguments = _parser().parse_args(argv)
        if arguments.command == "benchmark":
            run_benchmark(arguments)
        elif arguments.command == "study":
            run_study(arguments)
        elif arguments.command == "point":
            run_point(arguments)
        else:
            tidy(arguments.notebook)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
