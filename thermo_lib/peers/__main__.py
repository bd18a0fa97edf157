"""``python -m thermo_lib.peers``: score what ``thermo_lib.peers.quantize`` made and print the table."""

import sys

from thermo_lib.models import load_model
from thermo_lib.notebooks import reproducible
from thermo_lib.peers import REPORT, score_all
from thermo_lib.report import read_json, table

COLUMNS = {
    "method": ("method", "{}"),
    "setting": ("setting", "{}"),
    "bpw": ("bits_per_weight", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "95 %": ("accuracy_ci", "{0[0]:.3f}..{0[1]:.3f}"),
    "NELBO": ("nelbo", "{:.2f}"),
    "path KL": ("path_kl", "{:.1f}"),
    "Sudoku": ("sudoku_solved", "{:.2f}"),
    "accuracy A4": ("accuracy_a4", "{:.3f}"),
    "path KL A4": ("path_kl_a4", "{:.1f}"),
    "s": ("seconds", "{:.1f}"),
    "MiB": ("peak_mib", "{:.0f}"),
}


def main() -> int:
    """Score and print; 0 on success, 2 on damaged results, with the reason on stderr."""
    reproducible()
    try:
        score_all(load_model("reference"))
        report = read_json(REPORT)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(sorted(report["rows"], key=lambda row: row["path_kl"]), COLUMNS))
    for failed in report["errors"]:
        print(f"{failed['method']}, {failed['setting']}: {failed['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
