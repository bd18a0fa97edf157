"""What files of results may hold: those of ``evaluate``, ``point``, ``study`` and ``benchmark``."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from thermo_lib.files.schema import Row

_MOST = 10.0**12  # of a score; figures are drawn of them


def _name(text: str) -> str:
    if not text.isprintable() or "$" in text:  # figures would read it as a formula
        raise ValueError("a text without ends of lines and $")
    return text


def _scalar(value: Any) -> Any:
    if isinstance(value, list | dict):
        raise ValueError("a number or a word")
    return value


def _ends(values: list[float]) -> list[float]:
    if values[0] > values[1]:
        raise ValueError("the lower end first")
    return values


Score = Annotated[float, Field(ge=-_MOST, le=_MOST)]
Scores = Annotated[list[Score], Field(min_length=1)]
Interval = Annotated[list[Score], Field(min_length=2, max_length=2), AfterValidator(_ends)]
Name = Annotated[str, AfterValidator(_name), Field(min_length=1, max_length=200)]
Mix = dict[str, Annotated[Any, AfterValidator(_scalar)]]


class Pairs(Row):
    """``sequences``: see ``comparison.per_sequence``."""

    inputs: str
    accuracy: Scores | None = None
    nelbo: Scores | None = None
    path_kl: Scores | None = None
    sudoku_solved: Scores | None = None


class Evaluated(Row):
    """A row of scores, and the whole of what ``evaluate`` writes; what wasn't measured is missing or null."""

    name: str
    accuracy: Score | None = None
    accuracy_ci: Interval | None = None
    nelbo: Score | None = None
    path_kl: Score | None = None
    path_kl_ci: Interval | None = None
    sudoku_solved: Score | None = None
    markov_score: Score | None = None
    bits_per_weight: Score | None = None
    megabytes: Score | None = None
    sequences: Pairs | None = None


class FullPrecision(Evaluated):
    """``full_precision`` of a report."""

    name: Name


class Configuration(FullPrecision):
    """An entry of ``configurations``."""

    bits_per_weight: Score
    activation_bits: Annotated[int, Field(ge=1, le=64)]
    accuracy: Score
    accuracy_ci: Interval
    path_kl: Score
    path_kl_ci: Interval
    path_kl_per_timestep: Annotated[Scores, Field(max_length=2**16)]


class Target(Row):
    """An entry of ``targets``."""

    name: str
    precision: str | None = None
    smoothing_method: str | None = None
    verdict: Literal["met", "not met", "inconclusive"]
    value: Score
    ci: Interval
    target: Score


class ReportRows(Row):
    """Of a ``report.json`` what is compared."""

    full_precision: FullPrecision
    configurations: Annotated[list[Configuration], Field(max_length=1000)]
    targets: Annotated[list[Target], Field(max_length=1000)]

    @model_validator(mode="after")
    def _differ(self) -> Self:
        names = [row.name for row in (self.full_precision, *self.configurations)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"configurations: found the name {twice[0]!r} twice, allowed is each once")
        return self


class Hardware(Row):
    """``hardware`` of a report."""

    processor: str
    machine: str
    threads: Annotated[int, Field(ge=1, le=2**20)]


class Seeds(Row):
    """``seeds`` of a report."""

    all: int


class Report(ReportRows):
    """Of a ``report.json`` what its page shows."""

    model: str
    versions: dict[str, str]
    hardware: Hardware
    seeds: Seeds


class Config(Row):
    """``config`` of a point; ``ThermoConfig`` checks the rest."""

    timesteps: int


class Point(Row):
    """``point`` of a measured point."""

    config: Config
    calibration_seed: int | None = None
    recipe: str | None = None
    mix: Mix | None = None


class PointRow(Row):
    """An entry of ``rows`` in a file of ``point`` or ``study``."""

    point: Point
    accuracy_per_sequence: Scores
    path_kl_per_sequence: Scores
    bits_per_weight: Score


class Points(Row):
    """The file of ``point`` or ``study``."""

    rows: list[PointRow]
