"""What a campaign shows while it runs, and how Ctrl-C ends it."""

import contextlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from jfi.campaign import campaign
from jfi.report import tables
from jfi.sampling.estimands import ACCURACY, FAULTS, PAIRS, WORDS

_TOLD = {FAULTS: "critical", PAIRS: "critical pairs", ACCURACY: "accuracy"}
QUIET_SECONDS = 30  # between lines of progress where there is no terminal


class LiveProgress:
    """Live progress on a terminal or in a notebook, a line now and then elsewhere."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = Console(stderr=True)
        # The text wraps where it is long; else it would push the bar out of the line.
        text = TextColumn("{task.description}", table_column=Column())
        columns = (text, *Progress.get_default_columns()[1:3], TimeRemainingColumn())
        # In a notebook rich draws on widgets.
        drawn = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        self.live = console.is_terminal or drawn
        self.bar = Progress(*columns, console=console, disable=not self.live)
        self.task = self.bar.add_task("faults", total=None)
        self.started = self.printed = time.monotonic()
        self.bar.__enter__()
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)

    def __call__(self, state: campaign.Progress) -> None:
        text = told(state, time.monotonic() - self.started)
        self.bar.update(self.task, completed=state.done, total=state.total, description=text)
        if not self.live and time.monotonic() - self.printed > QUIET_SECONDS:
            self.printed = time.monotonic()
            print(text, flush=True)


def told(state: campaign.Progress, spent: float) -> str:
    """Where a campaign stands after so many seconds, in one line."""
    rate = (state.done - state.resumed) / spent
    of = "" if state.total is None else f" of {state.total:,}"
    text = f"{state.done:,}{of} faults, {rate:,.0f} faults/s"
    if rate > 0 and state.total is not None:
        text += f", {(state.total - state.done) / rate:,.0f} s left"
    if state.estimate is None and state.estimand.name != FAULTS:
        text += f", for the {WORDS[state.estimand.name]}"
    if state.estimate is not None:
        e, sampled = state.estimate, 1 - state.estimate.unsampled
        # Strata not yet reached count as unchanged in the estimate; so far, it speaks for others.
        seen = e.estimate - state.estimand.unchanged * e.unsampled
        share, margin = (tables.percent(x / sampled) for x in (seen, e.margin))
        what = _TOLD[state.estimand.name]
        text += f", {what} {share} ± {margin}% of the {sampled:.0%} of faults sampled so far"
    return text


@contextlib.contextmanager
def stoppable(
    progress: Callable[[campaign.Progress], None], go_on: str
) -> Iterator[Callable[[campaign.Progress], None]]:
    """`progress` for a campaign that Ctrl-C ends once the shard in flight is on record.

    A second Ctrl-C ends it at once. Only the main thread hears Ctrl-C, and a handler that the
    program put there itself is left alone.

    Args:
      go_on: says how the campaign goes on.

    Raises:
      KeyboardInterrupt: in place of the one that ended the campaign, with `go_on` as its message.
    """
    asked = threading.Event()

    def ask(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        # Not print: the interrupt may have come in the midst of one.
        os.write(2, b"\nending after the shard in flight; Ctrl-C again ends at once\n")

    def checked(state: campaign.Progress) -> None:
        progress(state)
        if asked.is_set():
            raise KeyboardInterrupt

    heard = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if heard:
        signal.signal(signal.SIGINT, ask)
    try:
        yield checked
    except KeyboardInterrupt:
        raise KeyboardInterrupt(go_on) from None
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
