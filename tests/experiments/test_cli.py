"""How a script ends: its exit status and its one line."""

import sys

import pytest

from experiments import campaign, cli, plan
from experiments.data import __main__ as data
from experiments.train import __main__ as train
from jfi.errors import InputError
from nets import NetError


def ended(monkeypatch, main, *arguments: str) -> int:
    """Exit status of a script with that `main` (None is 0)."""
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    monkeypatch.setattr(cli.tuning, "keep_compiled", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code or 0


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("site 'x':\nno such site"), 2, "error: site 'x': no such site\n"),
        (NetError("net 'y' is unknown"), 2, "error: net 'y' is unknown\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (KeyboardInterrupt("stopped; go on so"), 130, "error: stopped; go on so\n"),
    ],
)
def test_expected_errors_are_one_line(monkeypatch, capsys, error, status, line):
    def main():
        raise error

    assert ended(monkeypatch, main) == status
    assert capsys.readouterr().err == line


def test_defects_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(cli.tuning, "keep_compiled", lambda: None)
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_status_is_what_main_returns(monkeypatch, result, status):
    assert ended(monkeypatch, lambda: result) == status


@pytest.mark.parametrize("argument", ["--no_such_flag=1", "digits"])
def test_bad_arguments_are_one_line(monkeypatch, capsys, argument):
    assert ended(monkeypatch, lambda: None, argument) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_help_is_the_docstring_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "What this script does.")
    assert ended(monkeypatch, lambda: 1, "--help") == 0
    assert capsys.readouterr().out.startswith("What this script does.\n\nFlags:")


@pytest.mark.parametrize("module", [campaign, plan, train, data])
def test_help_lists_every_flag_that_a_script_takes(script, module):
    """Its own and those of the modules it shares them with."""
    ended = script(module, "--help")
    assert ended.status == 0
    listed = {line.split("=")[0] for line in ended.out.splitlines() if line.startswith("  --")}
    wanted = "dataset data_dir".split()
    if module in (campaign, plan):
        wanted += "net weights sampler fault_model sites error_margin confidence t images".split()
    assert {f"  --{name}" for name in wanted} <= listed
    assert max(map(len, ended.out.splitlines())) <= 100


def test_help_tells_what_a_flag_takes(script):
    text = script(campaign, "--help").out
    assert "  --net=TEXT (default: lenet)\n      The network: lenet, resnet20" in text
    models = "stuck_at|flip|dead|saturated|byzantine"
    assert f"  --fault_model={models} (default: stuck_at)\n      Bits stuck at 0" in text
    assert "  --images=N\n" in text
    assert "  --error_margin=X (default: 0.01)\n" in text
    assert "  --[no]keep_bits\n" in text
