"""What the README shows works as it is shown."""

import importlib
import re
from pathlib import Path

import pytest

from experiments import target

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.M | re.S)


def test_the_example_prints_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    shown = blocks("text")[0].splitlines()
    assert [line.split(":")[0] for line in printed] == [line.split(":")[0] for line in shown]
    # To a tenth of a percent: rounding differs between machines, and with it a few near-ties.
    for one, other in zip(printed, shown, strict=True):
        numbers = [[float(x) for x in re.findall(r"([\d.]+)%", line)] for line in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.1)
    assert (tmp_path / "runs" / "own" / "summary.json").exists()


# What is run as `python -m experiments.NAME`, and the module that defines its flags.
SCRIPTS = {
    name: f"{name}.__main__" for name in "bench data date23 dear_cnn spikingjet train".split()
} | {
    "bench_samplers": "samplers.benchmark",
    "campaign": "campaign",
    "plan": "plan",
    "report": "report",
    "sampler_table": "samplers.table",
    "truth": "samplers.truth",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_of_the_commands_shown_exist(name):
    """And those that the scripts' own descriptions show."""
    module = importlib.import_module(f"experiments.{SCRIPTS[name]}")
    source = Path(module.__file__).read_text() + Path(target.__file__).read_text()
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))
    for text in (README.read_text(), module.__doc__):
        joined = text.replace("\\\n", " ").replace("\\\\\n", " ")
        for command in re.findall(rf"python -m experiments\.{name}(?!\w)(.*)", joined):
            assert set(re.findall(r"--(\w+)=", command)) <= defined
