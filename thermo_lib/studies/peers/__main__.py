"""``python -m thermo_lib.studies.peers``: score what ``thermo_lib.studies.peers.quantize`` made and print the table."""

import sys

from thermo_lib.evaluation.report import table
from thermo_lib.files.locks import locked
from thermo_lib.models.lm import load_model
from thermo_lib.notebooks import reproducible
from thermo_lib.studies.peers import COST_COLUMNS, PEER_COLUMNS, PEERS_REPORT, read_earlier, score_all


def main() -> int:
    """Score and print; 0 on success, 2 on damaged results, with the reason on stderr."""
    reproducible()
    try:
        with locked(PEERS_REPORT):
            score_all(load_model("reference"))
        report = read_earlier(PEERS_REPORT)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(sorted(report["rows"], key=lambda row: row["path_kl"]), PEER_COLUMNS | COST_COLUMNS))
    for failed in report["errors"]:
        print(f"{failed['method']}, {failed['setting']}: {failed['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
