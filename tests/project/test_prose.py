"""Numbers in pages come from the results files: each mark is fresh, and README has no result without a mark."""

import json
import re
from pathlib import Path

import pytest

from thermo_lib import prose

ROOT = Path(__file__).resolve().parents[2]
# What README says with a unit or a decimal point and isn't a result: versions, sizes of models, settings, the claim.
SETTINGS = {
    "3.11",  # Python
    "3.9 million",  # parameters of the reference model
    "26 million",  # parameters of AntiBERTy
    "2 to 3 %",  # what an earlier project claimed
}
A_RESULT = re.compile(
    r"\d[\d,.]*(?: to \d[\d,.]*)?(?: %| (?:million|billion|nats|s|seconds|minutes|hours|ms|times|GB|GiB|MB|MiB)\b)"
    r"|\d+\.\d+"
)


def unmarked(text: str) -> list[str]:
    """The results of a page that no mark gives: in its sentences, and rows of tables that end in numbers."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not (line.startswith("|") and re.search(r"<!--= [^>]*: ", line))]
    rows = [
        line for line in lines if line.startswith("|") and re.search(r"\|\s*\**[-+]?\d[\d.,]*\**[^|]{0,3}\|$", line)
    ]
    plain = re.sub(r"<!--=[^>]*-->[^<]*<!--/-->|`[^`]*`|\]\([^)]*\)", " ", "\n".join(lines))
    return rows + [found for found in A_RESULT.findall(plain) if found not in SETTINGS]


@pytest.mark.parametrize("page", [page for page in prose.PAGES if (ROOT / page).is_file()])
def test_the_numbers_of_a_page_are_those_of_the_reports(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert prose.filled(text) == text, f"{page} is stale: `python -m thermo_lib.prose` fills it in"


@pytest.mark.parametrize("page", prose.PAGES)
def test_no_line_begins_with_a_mark(page: str) -> None:
    """A comment at the start of a line ends the paragraph, and what follows it there isn't read as Markdown."""
    assert not re.findall(r"^ {0,3}<!--.*", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)


def test_pages_with_marks_are_filled_in() -> None:
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    marked = {str(path.relative_to(ROOT)) for path in paths if "<!--=" in path.read_text(encoding="utf-8")}
    assert marked <= set(prose.PAGES)


def test_readme_has_no_result_without_a_mark() -> None:
    assert unmarked((ROOT / "README.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It takes <!--= best seconds -->514<!--/--> s.", []),
        ("It takes 514 s.", ["514 s"]),
        ("It keeps 99.0 % of it, on Python 3.11.", ["99.0 %"]),
        ("| best <!--= best: bits --> | 2.24 |", []),
        ("| best | **2.24** ¹ |", ["| best | **2.24** ¹ |", "2.24"]),
        ("```\n514 s\n```\n`2.24 bits` and [a](b_2.24.md)", []),
    ],
)
def test_a_result_is_told_from_a_setting(text: str, found: list[str]) -> None:
    assert unmarked(text) == found


def test_a_mark_has_the_value_of_the_report() -> None:
    rows = json.loads((ROOT / "reports" / "peers.json").read_text(encoding="utf-8"))["rows"]
    (best,) = (row for row in rows if (row["method"], row["setting"]) == ("thermo_lib trellis", "all phases"))
    marked = "| **best** <!--= best: accuracy - kl --> | **1** ¹ | kept | | text |\n<!--= best seconds -->old<!--/--> s"
    expected = (
        f"| **best** <!--= best: accuracy - kl --> | **{best['accuracy']:.3f}** ¹ | kept | {best['path_kl']:.1f} "
        f"| text |\n<!--= best seconds -->{best['seconds']:.0f}<!--/--> s"
    )
    assert prose.filled(marked) == expected
    assert prose.filled(expected) == expected


def test_a_claim_has_its_interval_and_verdict() -> None:
    """The sign of a lead is that of a change turned round, and its ends stay in order."""
    change, lead = prose.value("best/gptq", "change"), prose.value("best/gptq", "ahead")
    one, low, high = (float(found) for found in re.findall(r"-?[\d.]+", change))
    assert [float(found) for found in re.findall(r"-?[\d.]+", lead)] == [-one, -high, -low]
    assert low <= one <= high < 0
    assert prose.value("best", "kept_verdict") in {"met at 99 %", "not met at 99 %", "inconclusive at 99 %"}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"size": f"{i} -> 4", "ms": ms, "peak mib": 2048, "why": None} for i, ms in ((2, 1.5), (3, 1.25), (4, 2.75))
    ]
    report = {"models": {"one": rows[0], "another==1.0": rows[1]}, "rows": rows, "card": "a card"}
    printed = "fast: 2,048 MiB in 3 s\nslow: 12 s"
    monkeypatch.setattr(prose, "_report", lambda name: report)
    monkeypatch.setattr(prose, "_printed", lambda notebook: printed)


@pytest.mark.parametrize(
    ("source", "quantity", "text"),
    [
        ("gpu", "card:s", "a card"),
        ("gpu.rows[size=2→4]", "ms:.2f", "1.50"),
        ("gpu.rows[size=2 → 4]", "ms*1000:.0f", "1500"),
        ("gpu.rows[size=2→4]", "peak_mib/1024:.1f", "2.0"),
        ("gpu.rows[size=2→4]", "ms*28/60:.1f", "0.7"),
        ("gpu.rows[size!=2→4]", "range:ms:.2f", "1.25 to 2.75"),
        ("gpu.rows[size!=2→4;size~3]", "range:ms:.2f", "1.25"),
        ("gpu.rows", "mean:ms*2:.2f", "3.67"),
        ("gpu.models.another*", "ms:.2f", "1.25"),
        ("gpu.models.*", "max:ms:.1f", "1.5"),
        ("a_notebook", r"/slow: (\d+) s/", "12"),
        ("a_notebook", r"/fast: ([\d,]+) MiB/*1e-3:.1f", "2.0"),
    ],
)
@pytest.mark.usefixtures("made_up")
def test_a_quantity_of_a_report(source: str, quantity: str, text: str) -> None:
    assert prose.value(source, quantity) == text


@pytest.mark.usefixtures("made_up")
def test_one_quantity_fills_a_cell_for_each_word_before_it() -> None:
    row = "| a <!--= gpu.rows[size=*→4]: - 2,3@ms:.2f 4@ms:.1f --> | 256 | ? | **?** | ? |"
    assert prose.filled(row) == row.replace("| ? | **?** | ? |", "| 1.50 | **1.25** | 2.8 |")
    with pytest.raises(ValueError, match="found 4 quantities, allowed are at most 3 cells"):
        prose.filled("| a <!--= gpu.rows[size=*→4]: - 2,3@ms:.2f 4@ms:.1f --> | 256 | ? | ? |")


@pytest.mark.parametrize(
    ("form", "text"),
    [(".1%", "0.0 %"), ("+.1%", "0.0 %"), (".2f", "0.00"), (".0f", "0")],
)
def test_zero_has_no_sign(form: str, text: str) -> None:
    assert prose.number(-1e-9, form) == text


@pytest.mark.parametrize(
    ("source", "quantity", "message"),
    [
        ("bset", "kl", "source: found 'bset', allowed are "),
        ("best", "klx", "best: found quantity 'klx', allowed are "),
        ("best", "klx:.1f", "best: found quantity 'klx', allowed are "),
        ("peers.rows", "range:klx:.1f", "peers.rows: found quantity 'klx', allowed are "),
        ("witness.none*", "kl", "witness.none*: found no 'none*'"),
        ("peers.rows", "kl", "peers.rows: found 43 records, allowed is one"),
        ("witness.rows[method=none]", "kl", "witness.rows[method=none]: found no such record"),
        (
            "study(activation_bits=4 num_time_groups=7)",
            "kl",
            "study(activation_bits=4 num_time_groups=7): found 0 seeds",
        ),
        ("dream_7b", "/(no such text)/", "dream_7b: /(no such text)/: found 0 times, allowed is once"),
    ],
)
def test_a_mark_that_names_nothing_is_refused(source: str, quantity: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prose.value(source, quantity)


def test_a_stale_page_is_named_and_filled_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!--= best kl -->0<!--/-->", encoding="utf-8")
    assert prose.main(["--check", str(page)]) == 1
    assert page.read_text(encoding="utf-8") == "<!--= best kl -->0<!--/-->"
    assert "its numbers are stale" in capsys.readouterr().out
    assert prose.main([str(page)]) == 0
    assert prose.main(["--check", str(page)]) == 0
