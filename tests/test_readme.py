"""What the README shows works as it is shown."""

import re
from pathlib import Path

import pytest

from experiments import (
    bench,
    bench_samplers,
    campaign,
    data,
    date23,
    dear_cnn,
    plan,
    sampler_table,
    spikingjet,
    train,
    truth,
)

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


SCRIPTS = [
    bench, bench_samplers, campaign, data, date23, dear_cnn, plan, sampler_table, spikingjet, train,
    truth,
]  # fmt: skip


@pytest.mark.parametrize("module", SCRIPTS)
def test_flags_of_the_commands_shown_exist(module):
    """And those that the scripts' own descriptions show."""
    source = Path(module.__file__).read_text() + Path(campaign.target.__file__).read_text()
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))
    name = f"experiments.{Path(module.__file__).stem}"
    for text in (README.read_text(), module.__doc__):
        joined = text.replace("\\\n", " ").replace("\\\\\n", " ")
        for command in re.findall(rf"python -m {name}(?!\w)(.*)", joined):
            assert set(re.findall(r"--(\w+)=", command)) <= defined
