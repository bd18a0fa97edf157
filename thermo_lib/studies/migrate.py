"""Bring measurements of version 0.1 up to date: ``python -m thermo_lib.studies.migrate reports/study.json ...``.

Fields were renamed and nested; every number stays as it was measured, which is checked before a file is replaced.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thermo_lib.files.locks import locked
from thermo_lib.files.printing import to_its_end
from thermo_lib.files.reading import read_report
from thermo_lib.files.text import write_json
from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.studies.grid import Inputs, Point
from thermo_lib.studies.peers.quantize import JOBS, made_of


def migrate_point(flat: dict[str, Any]) -> Point:
    """A point as version 0.1 wrote it: flat fields of the configuration, seed and recipe."""
    fields = {name: value for name, value in flat.items() if name not in ("calibration_seed", "recipe")}
    return Point(ThermoConfig.from_flat(fields), flat["calibration_seed"], flat["recipe"])


def migrate_study(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of points, with nested configurations.

    Raises:
        ValueError: two points that are the same now, so that one of them would be lost.
    """
    about, rows = content["made_of"], {}
    for row in content["rows"]:
        point = migrate_point(row["point"])
        if point.key in rows:
            raise ValueError(f"study: found two points that mean the same: {point.to_dict()}")
        rows[point.key] = row | {"point": point.to_dict()}
    inputs = Inputs(
        sequences=about["evaluation"]["sequences"],
        trajectories=about["evaluation"]["trajectories"],
        **about["calibration"],
    )
    made_of = {"weights": about["weights"], "inputs": vars(inputs)}
    return {"made_of": made_of, "rows": [rows[key] for key in sorted(rows)]}


def migrate_peers(content: dict[str, Any]) -> dict[str, Any]:
    """The content of the peers' report, this project's rows with today's digests of their settings."""
    current = {(job.method, job.setting): made_of(job) for job in JOBS if job.adapter == "thermo"}
    rows = [row | {"made_of": current.get((row["method"], row["setting"]), row["made_of"])} for row in content["rows"]]
    return content | {"rows": rows}


def measurements(content: dict[str, Any]) -> list[str]:
    """All that was measured in a file, in an order of its own: every field of its rows but what they are made of."""
    kept = ({k: v for k, v in row.items() if k not in ("point", "made_of")} for row in content["rows"])
    return sorted(repr(sorted(row.items())) for row in kept)


@to_its_end
def main(paths: Sequence[str]) -> int:
    """Migrate files in place."""
    for path in map(Path, paths):
        with locked(path, wait=True):
            content = read_report(path, rows={})
            changed = migrate_peers(content) if "full_precision" in content else migrate_study(content)
            if measurements(changed) != measurements(content):
                raise ValueError(f"{path}: found other numbers after the migration; the file is as it was")
            write_json(path, changed)
        print(f"{path}: {len(changed['rows'])} rows, every number as before")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
