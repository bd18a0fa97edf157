"""``python -m thermo_lib.studies.peers``: score what ``thermo_lib.studies.peers.quantize`` made and print the table."""

import argparse
import sys

from thermo_lib.evaluation.report import table
from thermo_lib.files.locks import locked
from thermo_lib.files.printing import to_its_end
from thermo_lib.notebooks import reproducible
from thermo_lib.studies.peers import COST_COLUMNS, PEER_COLUMNS, read_earlier, score_all
from thermo_lib.studies.peers.subjects import SUBJECTS


@to_its_end
def main() -> int:
    """Score and print; 0 on success, 2 on damaged results, with the reason on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SUBJECTS), default="reference", help="what was quantized")
    subject = SUBJECTS[parser.parse_args().model]
    reproducible()
    try:
        with locked(subject.report):
            score_all(subject.load(), subject.folder, subject.report, subject.suite)
        report = read_earlier(subject.report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(sorted(report["rows"], key=lambda row: row["path_kl"]), PEER_COLUMNS | COST_COLUMNS))
    for failed in report["errors"]:
        print(f"{failed['method']}, {failed['setting']}: {failed['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
