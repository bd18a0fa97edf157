"""The command line: ``python -m thermo_lib quantize``, ``generate``, ``chat``, ``evaluate``, ``benchmark``, ...

``quantize`` writes a quantized folder, which ``generate``, ``chat``, ``evaluate`` and ``info`` take as well as a
full-precision one. ``benchmark`` asks the project's question about any model without a notebook; it runs their code.
``study`` measures the points of the grid behind the notebook ``06_smoothing_study``, ``point`` any single one;
``tidy`` is for the pipeline. What a command needs is imported once it runs, so that help comes at once.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thermo_lib.files.printing import is_unread, to_its_end
from thermo_lib.options import SMOOTHING, check, number, states, whole
from thermo_lib.pipeline.presets import DEFAULT, PRESETS
from thermo_lib.usage import FIRST_STEPS, Parser, page, program

ABOUT = "Quantize diffusion language models, and measure what that costs."


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of commands that let a model write."""
    parser.add_argument("--max-new-tokens", type=whole, default=64, help="tokens to fill (%(default)s)")
    parser.add_argument("--timesteps", type=whole, default=64, help="denoising steps (%(default)s)")
    parser.add_argument(
        "--sampler",
        help="which tokens first, see generate (entropy, with --threshold low_confidence)",
    )
    parser.add_argument("--temperature", type=number, default=0.0, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=number, help="of the probability that tokens are drawn from")
    parser.add_argument("--top-k", type=whole, help="tokens that are drawn from")
    parser.add_argument("--alg-temp", type=number, default=0.0, help="of the choice of positions (%(default)s)")
    parser.add_argument("--block-length", type=whole, help="fill blocks of so many tokens, left to right (0: none)")
    parser.add_argument(
        "--threshold", type=number, help="fill what the model is surer of than this at once (at most 1)"
    )
    some_ids: dict[str, Any] = {"type": whole, "nargs": "+", "metavar": "ID"}
    parser.add_argument("--suppress-tokens", default=(), **some_ids, help="ids that are never written")
    parser.add_argument("--begin-suppress-tokens", default=(), **some_ids, help="ids that aren't written first")
    parser.add_argument("--end-tokens", **some_ids, help="ids that end a text (those of the model's configuration)")
    parser.add_argument("--suppress-end", action="store_true", help="write no end")
    parser.add_argument("--end-last", action="store_true", help="write ends only where nothing else can be filled")
    parser.add_argument(
        "--stop-at-end",
        action=argparse.BooleanOptionalAction,
        help="stop once all before an end is written",
    )
    parser.add_argument("--seed", type=whole, default=0, help="equal seeds give equal texts (%(default)s)")


def _add_kind(parser: argparse.ArgumentParser) -> None:
    """What the files of a full-precision model may leave open."""
    plain = "where config.json is plain qwen2, qwen3 or llama, e.g. open-dcoder"
    parser.add_argument("--family", help=plain)
    blocks = "of block-causal attention, where config.json doesn't say it"
    parser.add_argument("--attention-block", type=whole, metavar="TOKENS", help=blocks)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, to stdout")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """What models are scored on."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="score on this text, or JSON lines with 'text' or 'messages'",
    )
    parser.add_argument("--sequences", type=whole, help="number of held-out sequences (40)")
    parser.add_argument("--trajectories", type=whole, help="number of the reference's own trajectories (16)")
    parser.add_argument("--length", type=whole, help="number of tokens of both (128)")
    parser.add_argument("--timesteps", type=whole, default=16, help="T (%(default)s)")


def _version() -> str:
    """Of the installed package; a checkout that another Python runs has none."""
    try:
        return importlib.metadata.version("thermo_lib")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout, not installed"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program(), usage="%(prog)s COMMAND [WORDS AND OPTIONS]", description=ABOUT, epilog=FIRST_STEPS)
    parser.add_argument("--version", action="version", version=f"thermo_lib {_version()}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    def command(name: str, text: str, words: str = "[options]") -> argparse.ArgumentParser:
        how: dict[str, Any] = {
            "prog": f"{program()} {name}",
            "usage": f"%(prog)s {words}",
            "description": f"{text[0].upper()}{text[1:]}.",
            "help": text,
        }
        return commands.add_parser(name, **how, **page(name))

    some_model: dict[str, Any] = {"default": "reference", "help": "'reference', a folder or a hub id (%(default)s)"}
    devices: dict[str, Any] = {"help": "e.g. cpu or cuda:1 (the first GPU, if there is one)"}
    dtypes: dict[str, Any] = {
        "choices": ["stored", "float32", "bfloat16", "float16"],
        "default": "stored",
        "metavar": "TYPE",
        "help": "of numbers: stored (that of the files), float32, bfloat16, float16 (%(default)s)",
    }
    dense: dict[str, Any] = {
        "action": "store_true",
        "help": "dequantize once, for the speed and the memory of full precision",
    }
    some_fields: dict[str, Any] = {"nargs": "*", "metavar": "NAME=VALUE"}

    writer = command("quantize", "write a quantized folder", "--output FOLDER [options] [NAME=VALUE ...]")
    writer.add_argument("--model", **some_model)
    _add_kind(writer)
    writer.add_argument("--output", type=Path, required=True, help="folder; an earlier one is replaced at the end")
    writer.add_argument(
        "--layerwise",
        type=states,
        metavar="STATES",
        help="calibrate in little memory, on so many states of each length or 'all'",
    )
    writer.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a dask cluster, e.g. tcp://host:8786, or 'local'",
    )
    writer.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="calibrate on this text, or JSON lines with 'text' or 'messages'",
    )
    writer.add_argument("--sequences", type=whole, help="number of sequences of that text (128)")
    writer.add_argument("--length", type=whole, help="number of tokens of each (512)")
    writer.add_argument("--device", **devices)
    writer.add_argument(
        "--float32",
        action="store_true",
        help="on a GPU, products in float32 instead of TF32 (numbers of 11 bits)",
    )
    writer.add_argument(
        "fields",
        **some_fields,
        help=f"preset={'|'.join(PRESETS)} (preset={DEFAULT}), and settings of ThermoConfig that differ from it, e.g. "
        "weights.bits=4 activations.bits=8",
    )
    _add_json(writer)

    informer = command("info", "say what a model folder holds, full precision or quantized", "[MODEL] [options]")
    informer.add_argument("model", nargs="?", **some_model)
    _add_kind(informer)
    _add_json(informer)

    teller = command("generate", "let a model, full precision or quantized, continue a text", "--prompt TEXT [options]")
    teller.add_argument("--model", **some_model)
    _add_kind(teller)
    teller.add_argument("--prompt", required=True, help="the text")
    teller.add_argument("--chat", action="store_true", help="the prompt is a user's message to an instruct model")
    _add_sampling(teller)
    teller.add_argument("--dtype", **dtypes)
    teller.add_argument("--dense", **dense)
    teller.add_argument("--device", **devices)
    _add_json(teller)

    talker = command("chat", "talk to an instruct model, line by line; /clear starts over, /exit ends")
    talker.add_argument("--model", **some_model)
    _add_kind(talker)
    talker.add_argument("--system", metavar="TEXT", help="what the model is told before all")
    talker.add_argument("--raw", action="store_true", help="continue each line as plain text, without a chat template")
    _add_sampling(talker)
    talker.add_argument("--dtype", **dtypes)
    talker.add_argument("--dense", **dense)
    talker.add_argument("--device", **devices)

    judge = command("evaluate", "accuracy, NELBO and path KL of a model, full precision or quantized")
    judge.add_argument("--model", **some_model)
    _add_kind(judge)
    judge.add_argument("--reference", help="the full-precision model that a quantized one was made from")
    _add_inputs(judge)
    judge.add_argument("--output", type=Path, help="JSON file of the scores")
    judge.add_argument("--dtype", **dtypes)
    judge.add_argument("--dense", **dense)
    judge.add_argument("--device", **devices)
    _add_json(judge)

    pair = command("compare", "say how a model, or a file of results, differs from another", "A B [options]")
    sides = "a model (as for evaluate, or preset=NAME: the reference, quantized so), or a JSON file of results"
    pair.add_argument("a", metavar="A", help=sides)
    pair.add_argument("b", metavar="B", help="the same kind of thing; what is said is said of B")
    _add_kind(pair)
    pair.add_argument("--reference", help="the full-precision model (A or B, if one of them is)")
    _add_inputs(pair)
    pair.add_argument("--output", type=Path, help="JSON file of the differences")
    pair.add_argument("--dtype", **dtypes)
    pair.add_argument("--device", **devices)
    _add_json(pair)

    benchmark = command(
        "benchmark", "compare a model quantized with and without smoothing", "[options] [NAME=VALUE ...]"
    )
    which = benchmark.add_mutually_exclusive_group()
    which.add_argument("--all-methods", action="store_true", help="linear, cubic and sigmoid (default)")
    which.add_argument("--smoothing-method", choices=SMOOTHING, help="only this one")
    benchmark.add_argument("--model", **some_model)
    _add_kind(benchmark)
    for flag, value, text in (
        ("--bits", 2, "weight bits"),
        ("--activation-bits", 16, "16 for none"),
        ("--quantizer", "gptq", "rtn, least_squares or gptq"),
        ("--group-size", 128, "weights that share scale and zero point"),
        ("--timesteps", 16, "number of denoising steps"),
        ("--num-time-groups", 3, "number of groups of them"),
    ):
        kind = whole if isinstance(value, int) else str
        benchmark.add_argument(flag, type=kind, help=f"{text} ({value}; with preset= what it says)")
    window = "timesteps smoothed on each side, at most half of a group (5, or that half)"
    benchmark.add_argument("--smoothing-window", type=whole, help=window)
    benchmark.add_argument(
        "fields", **some_fields, help=f"preset={'|'.join(PRESETS)}, and settings that differ from it"
    )
    benchmark.add_argument("--output", type=Path, default=Path("artifacts/benchmark"), help="folder (%(default)s)")
    _add_json(benchmark)

    grid = command(
        "study", "measure the points of the smoothing study that are still missing", "--output FILE [options]"
    )
    grid.add_argument("--axes", choices=["reduced", "full"], default="reduced", help="section of params.yaml")
    grid.add_argument("--output", type=Path, required=True, help="JSON file of the points; what it holds is kept")

    single = command("point", "measure one configuration of the smoothing study", "[NAME=VALUE ...] [options]")
    single.add_argument("fields", **some_fields, help="e.g. preset=gptq activation_bits=4 method=linear")
    single.add_argument("--seeds", type=whole, nargs="+", default=[0], help="of the calibration data (%(default)s)")
    single.add_argument(
        "--output", type=Path, default=Path("artifacts/points.json"), help="JSON file of points (%(default)s)"
    )
    _add_json(single)

    clock = command("speed", "time products from codes against dense bfloat16 ones on this processor")
    clock.add_argument("--tokens", type=whole, nargs="+", default=[1, 32, 256, 2048], help="of the input (%(default)s)")
    clock.add_argument("--rounds", type=whole, default=15, help="counted turns, at least 2 (%(default)s)")
    clock.add_argument("--output", type=Path, default=Path("reports/speed.json"), help="JSON file (%(default)s)")
    _add_json(clock)

    text = "which kernels are right on this machine's GPU, and how long everything takes"
    checker = command("gpu-check", text)
    checker.add_argument("--quick", action="store_true", help="within two minutes instead of eight")
    checker.add_argument("--device", **devices)
    checker.add_argument("--output", type=Path, default=Path("reports/gpu.json"), help="JSON file (%(default)s)")

    printer = command("report", "make one HTML page of a report: figures, tables, verdicts", "[REPORT] [options]")
    printer.add_argument("report", nargs="?", type=Path, default=Path("reports/report.json"), help="(%(default)s)")
    printer.add_argument("--output", type=Path, default=Path("report.html"), help="HTML file (%(default)s)")
    _add_json(printer)

    cleaner = command("tidy", "remove run times and progress bars from an executed notebook", "NOTEBOOK")
    cleaner.add_argument("notebook", type=Path)
    return parser


@to_its_end
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on a wrong value, with the reason on stderr."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        check(arguments)
        if arguments.command == "tidy":  # the pipeline calls it after every stage; it needs hardly anything
            from thermo_lib.notebooks import tidy

            tidy(arguments.notebook)
        elif arguments.command == "compare":
            from thermo_lib import compare

            compare.run_compare(arguments)
        else:
            from thermo_lib import commands

            commands.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, OSError) and is_unread(error):
            raise
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        less = "quantize --layerwise needs less, and so do fewer --sequences or a shorter --length"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"error: memory: found none left ({reason:.150}); {less}", file=sys.stderr)
        return 2
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the machine; torch has no class for the second."""
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or "can't allocate memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
