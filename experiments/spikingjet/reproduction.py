"""What the paper shows, made again: Tables II and III, beside the published figures."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jfi.campaign import records

CONFIG = "net weights dataset images sampler fault_model sites error_margin confidence t seed"
CONFIG = CONFIG.split()
SHOWN = ("sdc_1", "sdc_0_5", "sdc_5_10", "sdc_10_20", "sdc_20", "masked", "non_finite")
TITLES = ("SDC-1", "SDC 0-5%", "SDC 5-10%", "SDC 10-20%", "SDC >20%", "masked", "non-finite")

# Table II: faults injected, and seconds.
PUBLISHED_TIMES = {
    "snn_dvs128": (16_307, 1 * 3600 + 42 * 60 + 25),
    "snn_nmnist500": (15_944, 4 * 3600 + 59 * 60 + 6),
    "snn_nmnist": (15_944, 4 * 3600 + 59 * 60 + 6),
    "snn_shd": (16_578, 1 * 3600 + 9 * 60 + 44),
}
_NMNIST = {
    "fc1/bias": (0.58, 92.75), "fc1/kernel": (0.15, 99.04),
    "lif1/beta": (0.69, 90.72), "lif1/potential": (1.99, 89.51),
    "lif1/spike": (3.65, 83.18), "lif1/threshold": (2.51, 88.59),
    "fc2/bias": (2.70, 87.71), "fc2/kernel": (3.10, 92.40),
    "lif2/beta": (3.08, 85.54), "lif2/potential": (2.44, 85.05),
    "lif2/spike": (8.78, 79.03), "lif2/threshold": (22.91, 70.54),
}  # fmt: skip
# Table III: percent SDC-1 and masked.
PUBLISHED = {
    "snn_nmnist": _NMNIST,
    "snn_nmnist500": _NMNIST,
    "snn_shd": {
        "fc1/bias": (2.76, 75.21), "fc1/kernel": (0.40, 93.12),
        "fb1/bias": (1.87, 71.47), "fb1/kernel": (0.55, 89.58),
        "lif1/beta": (2.06, 56.88), "lif1/potential": (3.17, 49.76),
        "lif1/spike": (13.59, 39.56), "lif1/threshold": (3.60, 64.66),
        "fc2/bias": (1.26, 41.77), "fc2/kernel": (1.90, 80.67),
        "lif2/beta": (0.0, 85.20), "lif2/potential": (0.0, 100.0),
        "lif2/spike": (0.0, 100.0), "lif2/threshold": (1.07, 70.61),
    },
    "snn_dvs128": {
        "conv1/bias": (1.46, 80.54), "conv1/kernel": (1.70, 69.78),
        "lif1/beta": (1.95, 66.13), "lif1/potential": (1.44, 89.50),
        "lif1/spike": (1.59, 89.66), "lif1/threshold": (4.90, 64.11),
        "conv2/bias": (5.41, 88.67), "conv2/kernel": (0.73, 95.05),
        "lif2/beta": (1.48, 78.59), "lif2/potential": (0.88, 92.06),
        "lif2/spike": (0.56, 94.48), "lif2/threshold": (15.82, 51.76),
        "fc1/bias": (0.00, 99.30), "fc1/kernel": (0.44, 97.32),
        "lif3/beta": (6.12, 32.81), "lif3/potential": (14.26, 18.41),
        "lif3/spike": (4.20, 30.91), "lif3/threshold": (90.53, 0.00),
    },
}  # fmt: skip


class Row(NamedTuple):
    """One layer and parameter: faults there are, faults injected, pairs by outcome [7] in [0, 1].

    The shares, in the order of `SHOWN`, are of the pairs of the faults injected; None without any.
    """

    site: str
    population: int
    injections: int
    shares: tuple[float, ...] | None


def rows(workdir: Path, sites: list[str], population: np.ndarray, samples: int) -> list[Row]:
    """Table III, and in its last row the whole network, from the records of a campaign.

    Args:
      population: int [S], faults there are in each site.
      samples: B.
    """
    faults = np.zeros(len(sites), np.int64)
    pairs = np.zeros((len(sites), len(SHOWN)), np.int64)
    for shard in records.read_shards(workdir, ("site", *SHOWN)):
        np.add.at(faults, shard["site"], 1)
        np.add.at(pairs, shard["site"], np.stack([shard[name] for name in SHOWN], axis=1))
    parts = [*zip(sites, population, faults, pairs, strict=True)]
    parts.append(("network", population.sum(), faults.sum(), pairs.sum(axis=0)))
    return [
        Row(name, int(there), int(n), tuple(own / (n * samples)) if n else None)
        for name, there, n, own in parts
    ]


def table_3(found: list[Row], published: dict[str, tuple[float, float]]) -> str:
    """Markdown: one line a layer and parameter."""
    titles = ("layer", "parameter", "faults", "n%", *TITLES, "SDC-1 (paper)", "masked (paper)")
    lines = [" | ".join(titles), " | ".join(["---", "---", *["---:"] * (len(titles) - 2)])]
    for row in found:
        layer, _, parameter = row.site.rpartition("/")
        shares = ["-"] * len(SHOWN) if row.shares is None else [_percent(s) for s in row.shares]
        paper = [f"{share:.2f}" for share in published.get(row.site, ())] or ["-", "-"]
        head = [layer or row.site, parameter if layer else "", f"{row.injections:,}"]
        part = _percent(row.injections / row.population)
        lines.append(" | ".join([*head, part, *shares, *paper]))
    return "\n".join(f"| {line} |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def table_2(kept: dict[str, dict]) -> str:
    """Markdown: one line a network that was run."""
    titles = ("network", "samples", "faults", "seconds", "faults/s", "faults (paper)", "s (paper)")
    lines = [" | ".join(titles), " | ".join(["---", *["---:"] * (len(titles) - 1)])]
    for name, one in kept.items():
        paper = [f"{n:,}" for n in PUBLISHED_TIMES.get(one["net"], ())] or ["-", "-"]
        rate = one["faults"] / one["seconds"]
        own = [f"{one['samples']:,}", f"{one['faults']:,}", f"{one['seconds']:.1f}", f"{rate:,.0f}"]
        lines.append(" | ".join([name, *own, *paper]))
    return "\n".join(f"| {line} |" for line in lines)


def keep(path: Path, net: str, found: list[Row], samples: int, summary: dict) -> None:
    """Write what Table II and Figure 2 need; the time of the call that ran most faults is kept."""
    run = summary["run"]
    one = {"net": net, "samples": samples, "injections": found[-1].injections}
    one |= {"faults": int(run["faults"]), "seconds": run["seconds"], "shares": found[-1].shares}
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["faults"] > run["faults"]:
            one |= {name: earlier[name] for name in ("faults", "seconds")}
    path.write_text(json.dumps(one, indent=2) + "\n")
