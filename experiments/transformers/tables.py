"""The tables of transformers by component, as Markdown, and all their numbers as CSV."""

from collections.abc import Mapping, Sequence

from experiments.papers.tables import markdown
from experiments.transformers.components import Counts, Share, share

ALL = "all"


def shares(
    of: Counts, names: Sequence[str], groups: Mapping[str, Sequence[int]], confidence: float
) -> dict[tuple[str, str], Share]:
    """The share of every component and all of them, by every group of bits and all of them."""
    rows = {name: [row] for row, name in enumerate(names)} | {ALL: range(len(names))}
    bits = {ALL: range(of.population.shape[1])} | dict(groups)
    return {
        (name, group): share(of, row, own, confidence)
        for name, row in rows.items()
        for group, own in bits.items()
    }


def by_component(found: Mapping[tuple[str, str], Share], samples: Mapping[str, Share | None]):
    """One line a component: the share by the sample of each bit, and by a simple one of all."""
    titles = (
        "component", "faults", "injections", "critical", "critical %", "interval %",
        "injections of one sample", "its interval %",
    )  # fmt: skip
    lines = []
    for name, one in _of(found, ALL).items():
        other = samples.get(name)
        told = (0, "0 .. 100") if other is None else (other.injections, _interval(other))
        head = (name, one.population, one.injections, one.critical)
        lines.append((*head, _percent(one.estimate), _interval(one), *told))
    return markdown(titles, lines)


def by_bits(found: Mapping[tuple[str, str], Share], groups: Mapping[str, Sequence[int]]) -> str:
    """One line a component, one column a group of bits: critical %, and the interval."""
    lines = [(name, *(_whole(found[name, group]) for group in groups)) for name in _of(found, ALL)]
    return markdown(("component", *groups), lines)


def injections(rows: Mapping[str, Mapping[str, int]], rounds: Mapping[str, Share]) -> str:
    """One line a component and the network: how many faults each sampler injects.

    Args:
      rows: of each, by sampler. rounds: what the sampler in rounds found.
    """
    samplers = [*next(iter(rows.values()))]
    lines = [
        (name, rounds[name].population, *row.values(), rounds[name].injections,
         _percent(rounds[name].estimate), _interval(rounds[name]))
        for name, row in rows.items()
    ]  # fmt: skip
    titles = ("component", "faults", *samplers, "adaptive_distance", "critical %", "interval %")
    return markdown(titles, lines)


def csv(found: Mapping[tuple[str, str], Share]) -> str:
    """Every share: component, bits, counts, estimate and interval."""
    head = ",".join(("component", "bits", *Share._fields))
    return "\n".join([head, *(",".join(map(str, (*key, *one))) for key, one in found.items()), ""])


def _of(found: Mapping[tuple[str, str], Share], group: str) -> dict[str, Share]:
    return {name: one for (name, own), one in found.items() if own == group}


def _percent(x: float) -> str:
    return f"{100 * x:.2f}"


def _interval(one: Share) -> str:
    return f"{_percent(one.low)} .. {_percent(one.high)}"


def _whole(one: Share) -> str:
    return f"{100 * one.estimate:.1f} ({100 * one.low:.1f} .. {100 * one.high:.1f})"
