"""What the README and the pages of `docs` show works as it is shown."""

import importlib
import re
from pathlib import Path

import pytest
from absl import flags

import jfi

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FIRST = ROOT / "docs" / "first-campaign.md"
MOST_LINES = 150
# Alike to a tenth of a percent: rounding differs between machines, and with it a few near-ties.
OFF = 0.1


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def run_blocks(page: Path) -> None:
    """The blocks that are shown to be run, in order, in one namespace."""
    names: dict = {"__name__": "shown"}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


def alike(printed: str, shown: str) -> bool:
    """The same lines, their percentages alike; progress, told on slow machines, is left out."""
    lines = [line for line in printed.splitlines() if "faults/s" not in line]
    pairs = list(zip(lines, shown.splitlines(), strict=False))
    return len(pairs) == len(shown.splitlines()) and all(
        re.sub(r"[\d.,]+", "#", one) == re.sub(r"[\d.,]+", "#", other)
        and percentages(one) == pytest.approx(percentages(other), abs=OFF)
        for one, other in pairs
    )


def percentages(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"([\d.]+)%", line)]


def test_the_start_prints_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(README)
    printed, (shown,) = capsys.readouterr().out, blocks(README, "text")
    assert alike(printed, shown)
    assert (tmp_path / "runs" / "Sequential_adaptive" / "report.html").exists()


def test_a_function_in_jax_prints_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(FIRST)
    assert alike(capsys.readouterr().out, blocks(FIRST, "text")[0])
    assert (tmp_path / "runs" / "own" / "summary.json").exists()
    assert (tmp_path / "runs" / "listed" / "summary.json").exists()


def test_the_ten_lines_make_a_report(tmp_path, monkeypatch):
    """From the files of a user: install, run, and eight lines of Python."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_model.py", "make_files.py"):
        (shown,) = blocks(FIRST, f'python title="{name}"')
        (tmp_path / name).write_text(shown)
    (installing,), campaign = blocks(FIRST, "console"), blocks(FIRST, "py")[0]
    assert len(re.findall(r"^.+$", installing + campaign, re.M)) == 10
    for code in ((tmp_path / "make_files.py").read_text(), campaign):
        exec(compile(code, "campaign.py", "exec"), {})
    assert (tmp_path / "runs" / "Net_adaptive" / "report.html").exists()


OTHERS = [page for page in PAGES if page not in (README, FIRST) and blocks(page, "python")]


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_blocks_of_other_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_go_somewhere(page):
    """Relative ones; headings that they name are there too."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def commands(text: str) -> dict[str, set[str]]:
    """By script, the flags that its commands in a text have."""
    found: dict[str, set[str]] = {}
    joined = re.sub(r"\\{1,2}\n\s*|(?<=[\w.])\n(?=--)", " ", text)
    for name, rest in re.findall(r"python -m experiments\.(\w+)([^`\n]*)", joined):
        found.setdefault(name, set()).update(re.findall(r"--(\w+)", rest))
    return found


SHOWN: dict[str, set[str]] = {}
for _page in PAGES:
    for _name, _flags in commands(_page.read_text()).items():
        SHOWN.setdefault(_name, set()).update(_flags)


@pytest.mark.parametrize("name", sorted(SHOWN.keys() - {"NAME"}))
def test_flags_of_the_commands_shown_exist(name):
    """And those that the scripts' own descriptions show."""
    module = importlib.import_module(f"experiments.{name}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"experiments.{name}.__main__")
    if not hasattr(module, "define_flags"):  # it starts one of another room
        (module,) = (x for x in vars(module).values() if hasattr(x, "define_flags"))
    known = set(flags.FLAGS)
    try:
        module.define_flags()
        defined = set(flags.FLAGS) - known
    finally:
        flags.FLAGS.remove_flag_values(set(flags.FLAGS) - known)
    asked = SHOWN[name] | commands(module.__doc__).get(name, set())
    missing = {f for f in asked if f not in defined and f.removeprefix("no") not in defined}
    assert not missing - {"help"}


def test_everything_public_has_a_place_on_the_page_of_the_api():
    headings = re.findall(r"heading: jfi\.(\w+)", (ROOT / "docs" / "api.md").read_text())
    assert sorted(headings) == sorted(jfi.__all__)
