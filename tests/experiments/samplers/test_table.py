"""experiments.sampler_table: rows of bench_samplers as tables, against figures done by hand."""

import json
import math

import pytest
from scipy import stats

from experiments.samplers import table

ADAPTIVE, FIXED = "adaptive by |dw|", "network_wise, normal"


def row(method, injections, asked=0.01, widest=None, **changes):
    return {
        "truth": "t",
        "method": method,
        "level": "network",
        "asked": asked,
        "confidence": 0.99,
        "injections": injections,
        "widest": asked if widest is None else widest,
        "coverage": 0.995,
        "repeats": 1000,
        "units": 1,
    } | changes


ROWS = [
    row(FIXED, 16000, 0.01, 0.002),
    row(FIXED, 400000, 0.005, 0.0005),
    row(ADAPTIVE, 500.0, 0.01),
    row(ADAPTIVE, 2000.4, 0.001, coverage=0.97, repeats=100, units=5),
    row(FIXED, 16000, 0.01, 0.06, level="layer"),
]


def cells(text, number):
    return [cell.strip() for cell in text.splitlines()[number].strip("|").split(" | ")]


def test_injections_are_listed_with_the_margin_where_it_is_missed():
    text = table.injections(ROWS, [FIXED, ADAPTIVE])
    assert cells(text, 0)[3:] == [FIXED, "adaptive by \\|dw\\|"]
    assert cells(text, 2) == ["t", "network", "1%", "16,000", "500"]
    assert cells(text, 4) == ["t", "network", "0.1%", "-", "2,000"]
    assert cells(text, 5) == ["t", "layer", "1%", "16,000 (± 6.00%)", "-"]


def test_injections_for_a_margin_lie_on_the_line_between_two_rows():
    """500 at 1% and 2000 at 0.1%: a power law in between, nothing outside."""
    own = table.where(ROWS, method=ADAPTIVE)
    slope = math.log(2000.4 / 500) / math.log(10)
    assert table.at_margin(own, 0.002) == pytest.approx(500 * 5**slope)
    assert table.at_margin(own, 0.001) == pytest.approx(2000.4)
    assert math.isnan(table.at_margin(own, 0.0005))
    assert math.isnan(table.at_margin([], 0.002))


def test_samplers_are_compared_at_the_margin_achieved():
    text = table.achieved(ROWS, [FIXED, ADAPTIVE])
    times = 16000 / table.at_margin(table.where(ROWS, method=ADAPTIVE), 0.002)
    assert cells(text, 2) == ["t", "network", FIXED, "1%", "0.200%", "16,000", f"{times:.1f}"]
    assert len(text.splitlines()) == 3  # no adaptive row reaches the others


def test_coverage_is_of_the_units_of_all_campaigns():
    """995 of 1000, and 485 of 100 campaigns of 5 units."""
    low = stats.binomtest(1480, 1500).proportion_ci(0.95, method="exact").low
    assert cells(table.coverage(ROWS, [ADAPTIVE]), 2) == [
        "t",
        "network",
        f"98.67% ({low:.2%} of 1,500)",
    ]


def test_the_script_writes_tables_and_a_figure(script, tmp_path):
    for number, part in enumerate((ROWS[:2], ROWS[2:])):
        (tmp_path / f"{number}.json").write_text(json.dumps(part))
    files = ",".join(str(tmp_path / f"{number}.json") for number in (0, 1))
    ended = script(table, f"--rows={files}", f"--out={tmp_path}")
    assert ended.status == 0, ended.err
    assert (tmp_path / "sampler_table.md").read_text() == ended.out
    assert (tmp_path / "sampler_table.png").read_bytes()[1:4] == b"PNG"


def test_each_confidence_has_its_tables_the_highest_first():
    lower = [{**r, "confidence": 0.95, "injections": r["injections"] / 2} for r in ROWS]
    both = table.text(lower + ROWS, [FIXED, ADAPTIVE])
    first, second = both.split("## 95%")
    assert "## 99%" in first
    assert table.injections(ROWS, [FIXED, ADAPTIVE]) in first
    assert table.injections(lower, [FIXED, ADAPTIVE]) in second


def test_of_two_rows_of_one_case_the_last_counts(tmp_path):
    for name, part in (("a", ROWS), ("b", [row(ADAPTIVE, 600, 0.01)])):
        (tmp_path / name).write_text(json.dumps(part))
    found = table.read([tmp_path / "a", tmp_path / "b"])
    assert len(found) == len(ROWS)
    assert [r["injections"] for r in table.where(found, method=ADAPTIVE, asked=0.01)] == [600]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, (), "rows.json cannot be read"),
        ("{", (), "rows.json cannot be read"),
        ("[1]", (), "rows.json cannot be read"),
        ("[]", (), "rows.json are not those of bench_samplers"),
        ('[{"truth": "t"}]', (), "rows.json are not those of bench_samplers"),
        (json.dumps(ROWS), ("--levels=bit",), "a level of bit and one of"),
        (json.dumps(ROWS), ("--methods=magic",), "and one of magic"),
    ],
)
def test_bad_input_is_named_in_one_line(script, own_folder, content, more, message):
    if content is not None:
        (own_folder / "rows.json").write_text(content)
    ended = script(table, "--rows=rows.json", *more)
    assert ended.status == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
