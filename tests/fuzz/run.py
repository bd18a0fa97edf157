"""``make fuzz``: read thousands of damaged inputs, and print what ends in anything else than a one-line error.

``python tests/fuzz/run.py --count 2000 --seed 1 --kind words fields``; ``--case KIND SEED`` runs a single one again.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from targets import KINDS, build, targets
from tqdm import tqdm
from workers import Case, Finding, Fuzzer


def cases(kinds: Sequence[str], count: int, seed: int) -> list[Case]:
    """As many cases of each kind, ``count`` in all."""
    return [Case.drawn(kinds[number % len(kinds)], f"{seed}:{number // len(kinds)}") for number in range(count)]


def collect(fuzzer: Fuzzer, todo: Sequence[Case], *, progress: bool = False) -> tuple[dict[str, Finding], Counter[str]]:
    """The smallest finding of each place, and how many there are."""
    found: dict[str, Finding] = {}
    counts: Counter[str] = Counter()
    with suppress(KeyboardInterrupt):  # what was found until then is told
        for finding in fuzzer.findings(tqdm(todo, unit="case", disable=not progress)):
            key = f"{finding.case.kind} {finding.place}"
            counts[key] += 1
            if key not in found or len(finding.changes) < len(found[key].changes):
                found[key] = finding
    return found, counts


def main() -> int:
    """Run the cases; 0 where nothing was found, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases of all kinds together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other cases (%(default)s)")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="only these (all)")
    parser.add_argument("--seconds", type=float, default=30.0, help="that a case may take (%(default)s)")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SEED"), help="run one case that was printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        with Fuzzer(targets, Path(name), arguments.seconds) as fuzzer:
            start = time.perf_counter()
            todo = (
                [Case.drawn(*arguments.case)]
                if arguments.case
                else cases(arguments.kind, arguments.count, arguments.seed)
            )
            found, counts = collect(fuzzer, todo, progress=True)
            seconds = time.perf_counter() - start
    for key in sorted(found):
        finding = found[key]
        print(f"\n{key} ({counts[key]} times)\n    {finding.message}\n    {ascii(finding.changes)[1:-1]}")
        print(f"    again: python tests/fuzz/run.py --case {finding.case.kind} {finding.case.seed}")
    print(f"\n{len(todo)} cases in {seconds:.0f} s, {len(found)} different findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
