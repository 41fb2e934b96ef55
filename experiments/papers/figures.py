"""Figures of the scripts, written as PNG. Shares come in [0, 1] and are shown in percent."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jfi.campaign.detection import Curves
from jfi.sampling.estimates import Estimate

COLOURS = ("#7fa8d1", "#1f5a96", "#8cbf88", "#2e7d32")
TRUTH, INJECTIONS = "#14304f", "#c8501e"
_MORE = ("#c8501e", "#8e5ea2", "#8a8a8a", "#14304f")


def bit_frequencies(path: Path, f0: np.ndarray, f1: np.ndarray) -> None:
    """How often each bit is 0 and 1, [W] each (DATE'23, Figure 3)."""
    figure, axes = _canvas((9, 3.6))
    at = np.arange(f0.size)
    for shift, share, name, colour in ((-0.2, f0, "f0", COLOURS[0]), (0.2, f1, "f1", COLOURS[1])):
        axes.bar(at - shift, 100 * share, 0.4, label=name, color=colour)
    _bits(axes, f0.size)
    axes.set_ylabel("weights, %")
    _save(figure, path)


def bit_p(path: Path, p: np.ndarray) -> None:
    """The failure probability assumed of each bit, [W] (DATE'23, Figure 4)."""
    figure, axes = _canvas((9, 3.6))
    axes.bar(np.arange(p.size), p, 0.7, color=COLOURS[1], label="p")
    _bits(axes, p.size)
    axes.set_ylabel("p")
    _save(figure, path)


def layers(path: Path, found: Mapping[str, Sequence[Estimate]], truth: Mapping[str, float]) -> None:
    """Critical faults of each layer by method, with margins, beside the truth where it is known.

    Args:
      found: estimates of the same layers in the same order, by method (DATE'23, Figures 5 and 7).
    """
    names = [e.unit for e in next(iter(found.values()))]
    figure, axes = _canvas((max(6.0, 1.5 + 0.55 * len(names)), 4.2))
    bars = {"exhaustive": [truth.get(name, np.nan) for name in names]} if truth else {}
    bars |= {method: [e.estimate for e in own] for method, own in found.items()}
    margins = {method: [e.margin for e in own] for method, own in found.items()}
    width = 0.8 / len(bars)
    for k, (method, shares) in enumerate(bars.items()):
        at = np.arange(len(names)) + width * (k - (len(bars) - 1) / 2)
        colour = TRUTH if method == "exhaustive" else COLOURS[k % len(COLOURS)]
        axes.bar(at, 100 * np.array(shares), width, label=method, color=colour)
        if method in margins:
            error = 100 * np.array(margins[method])
            axes.errorbar(at, 100 * np.array(shares), error, fmt="none", ecolor="k", elinewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="small")
    axes.set_ylim(0, None)
    axes.set_ylabel("critical faults, %")
    _save(figure, path)


def samples(
    path: Path, layer: str, found: Mapping[str, Sequence[Estimate]], truth: float | None
) -> None:
    """Repeated samples of one layer by each method, with injections (DATE'23, Figure 6).

    Args:
      found: estimates of the layer, one a sample, by method. truth: its exact share, if known.
    """
    figure, axes = _canvas((11, 4.2))
    right = axes.twinx()
    start = 0
    for k, (method, own) in enumerate(found.items()):
        at = np.arange(start, start + len(own))
        shares, margins = (100 * np.array([getattr(e, x) for e in own]) for x in
                           ("estimate", "margin"))  # fmt: skip
        axes.bar(at, shares, 0.7, color=COLOURS[k], label=method)
        axes.errorbar(at, shares, margins, fmt="none", ecolor="k", elinewidth=1)
        right.plot(at, [e.injections for e in own], color=INJECTIONS)
        start += len(own) + 1
    if truth is not None:
        axes.axhline(100 * truth, color=TRUTH, linewidth=1.5, label="exhaustive")
    ticks = [(at, f"S{k}") for at, k in _ticks(found)]
    axes.set_xticks(*zip(*ticks, strict=True), fontsize="x-small")
    axes.set_ylabel(f"critical faults of {layer}, %")
    axes.set_ylim(0, None)
    right.set_yscale("log")
    right.set_ylabel("injections", color=INJECTIONS)
    _save(figure, path)


def stacked(path: Path, shares: Mapping[str, Mapping[str, float]]) -> None:
    """Shares of outcomes, one bar a network (SpikingJET, Figure 2).

    Args:
      shares: by network, the share of each outcome, in [0, 1], in the order to stack them.
    """
    figure, axes = _canvas((max(4.0, 1.5 + 1.6 * len(shares)), 4.2))
    names = list(dict.fromkeys(name for own in shares.values() for name in own))
    below = np.zeros(len(shares))
    for k, name in enumerate(names):
        part = 100 * np.array([own.get(name, 0.0) for own in shares.values()])
        colour = None if k < 2 * len(COLOURS) else TRUTH
        axes.bar(range(len(shares)), part, 0.6, bottom=below, label=name, color=colour)
        below = below + part
    axes.set_xticks(range(len(shares)), list(shares), fontsize="small")
    axes.set_ylabel("pairs, %")
    _save(figure, path)


def metrics(path: Path, values: Mapping[str, np.ndarray], critical: np.ndarray) -> None:
    """Metric values [B] against the faults critical for each image [B] (DEAR-CNN, Figure 1)."""
    figure, panels = _panels(len(values))
    for axes, (name, column) in zip(panels, values.items(), strict=True):
        axes.scatter(column, critical, s=7, alpha=0.5, color=COLOURS[1], linewidths=0)
        axes.set_xlabel(name)
    panels[0].set_ylabel("faults critical for the image")
    _save(figure, path)


def classes(
    path: Path, ranked: Curves, chance: Curves, unit: str, metric: np.ndarray | None = None
) -> None:
    """Curves by class, images ranked and at random (DEAR-CNN, Figures 2 and 3).

    Args:
      metric: values in the order of `ranked`; drawn from 0 to 1 on the right, with a band of 10%
        around the last value of each curve.
    """
    names = [name for name in Curves._fields if getattr(ranked, name) is not None]
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        own, other = getattr(ranked, name), getattr(chance, name)
        # The legend needs each line once; it leaves out labels that start like this.
        hide = "" if axes is panels[0] else "_"
        axes.plot(own, color=COLOURS[1], label=f"{hide}ranked")
        axes.plot(other, color=COLOURS[0], label=f"{hide}random, mean")
        axes.axhline(own[-1], color=COLOURS[3], linestyle=":", label=f"{hide}all images")
        axes.set_ylim(0, max(1.15 * own[-1], 1.05 * own.max(), 1.05 * other.max()))
        axes.set_title(name.replace("_", "-"), loc="left", fontsize="medium")
        axes.set_xlabel("images")
        if metric is not None:
            _steady_state(axes, own[-1], metric, f"{hide}metric")
    panels[0].set_ylabel(unit)
    _save(figure, path)


def _steady_state(axes, last: float, metric: np.ndarray, label: str) -> None:
    """The band of 10% around a curve's last value, and the metric from 0 to 1."""
    for edge in (0.9, 1.1):
        axes.axhline(edge * last, color="k", linestyle=":", linewidth=0.8)
    scaled = (metric - metric.min()) / max(np.ptp(metric), np.finfo(float).tiny)
    right = axes.twinx()
    right.plot(scaled, color=INJECTIONS, linewidth=1, label=label)
    right.set_ylim(0, 1.05)


def detection(path: Path, curves: Mapping[str, np.ndarray], total: int) -> None:
    """Critical faults found by 1 to n images in several orders, of `total`."""
    figure, axes = _canvas((9, 5.4))
    styles = [(line, colour) for line in ("-", "--", ":") for colour in (*COLOURS, *_MORE)]
    for (name, found), (line, colour) in zip(curves.items(), styles, strict=False):
        axes.plot(
            np.arange(1, len(found)), 100 * np.asarray(found[1:]) / max(total, 1),
            label=name, color=colour, linestyle=line, linewidth=1.4,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("images")
    axes.set_ylabel("critical faults found, %")
    _save(figure, path, columns=3)


def _ticks(found: Mapping[str, Sequence]) -> list[tuple[int, int]]:
    """(place, number) of every sample; methods are one place apart."""
    starts = np.cumsum([0, *(len(own) + 1 for own in found.values())])
    return [
        (int(start) + k, k)
        for start, own in zip(starts[:-1], found.values(), strict=True)
        for k in range(len(own))
    ]


def _canvas(size: tuple[float, float]):
    # The object interface needs no display, no global backend and no clean-up.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, _plain(figure.add_subplot())


def _panels(count: int):
    """A figure with plots side by side."""
    figure, axes = _canvas((4.2 * count, 3.8))
    axes.remove()
    return figure, [_plain(figure.add_subplot(1, count, 1 + k)) for k in range(count)]


def _plain(axes):
    axes.spines[["top"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, axis="y", color="#e4e4e4")
    return axes


def _bits(axes, width: int) -> None:
    """The highest bit on the left, as a word is written."""
    axes.set_xlim(width - 0.3, -0.7)
    axes.set_xticks(range(width), [str(bit) for bit in range(width)], fontsize="small")
    axes.set_xlabel("bit")


def _save(figure, path: Path, columns: int = 6) -> None:
    if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
        figure.legend(frameon=False, fontsize="small", loc="outside upper left", ncols=columns)
    figure.savefig(path, dpi=150, metadata={"Software": None})
