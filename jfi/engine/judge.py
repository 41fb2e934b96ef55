"""What judges have before them, and what each of them does.

A judge decides pairs of faults and images. There are two: one runs them to the logits
(`jfi.engine.to_logits`), one from cut to cut (`jfi.engine.cut_to_cut`). The engine chooses one for
every site.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from jfi import bits
from jfi.criteria.criterion import Judgement
from jfi.engine.golden import Golden
from jfi.engine.radii import distance
from jfi.engine.routes import Ways
from jfi.faults import Faults, Site
from jfi.hardware.devices import Hardware
from jfi.networks.program import section
from jfi.networks.sites import Network
from jfi.networks.taps import Tap

PAIRS = 1 << 20  # most pairs listed on the host at a time


@dataclass(frozen=True, eq=False)
class Case:
    """A network, its workload of B images and its golden run.

    sites: those that faults name by position.
    by: what is critical.
    order: int [B], the order in which `detect` presents the images.
    memory: bytes of golden values kept on the device at a time.
    """

    network: Network
    sites: tuple[Site, ...]
    images: np.ndarray
    labels: np.ndarray
    by: Judgement
    golden: Golden
    order: np.ndarray
    hardware: Hardware
    memory: int

    @property
    def scores(self) -> Any:
        """The variable that the constraints of `by` are of."""
        program = self.network.program
        return program.out if self.by.on_outputs else self.network.scores

    @cached_property
    def leaves(self) -> list[Any]:
        """The parameters, on all devices."""
        return self.hardware.share(self.network.leaves)

    @cached_property
    def ways(self) -> Ways:
        """What the ways to run faults cost."""
        program = self.network.program
        return Ways(program, len(self.images), section(program, end=self.scores))

    @cached_property
    def at_run_time(self) -> np.ndarray:
        """bool [S]: the site is a run-time value."""
        return np.array([isinstance(self.network.source(site), Tap) for site in self.sites])

    def source(self, site: int) -> int | Tap:
        """The parameter leaf or the run-time value of a site, by its position."""
        return self.network.source(self.sites[site])

    def change(self, site: int, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
        """Faulty values [F] of faults in one parameter, and their distance from golden, float64."""
        golden = self.network.values(self.sites[site]).ravel()[faults.index]
        faulty = bits.faulty(golden, faults.bit, faults.polarity)
        return faulty, distance(faulty, golden)


class Judge(Protocol):
    """Decides pairs of faults and images."""

    def judge(
        self,
        faults: Faults,
        rows: np.ndarray,
        codes: np.ndarray,
        *,
        detect: bool = False,
        only: np.ndarray | None = None,
    ) -> np.ndarray:
        """Write the codes (`outcomes.classify`) of the faults `rows`, r of F, on all images.

        Args:
          codes: uint8 [F, B], written to.
          detect: it is enough to know of each fault whether it is critical for any image.
          only: bool [F, B], the pairs to decide; by default all.

        Returns:
          int [2, r]: on how many images each fault was run to the logits, and on how many it was
          certified not to be critical.
        """
        ...


def positions(index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """int32 [P, rank]: C-order positions as one index an axis."""
    at = np.unravel_index(index, shape) if shape else []
    return np.array(at, np.int32).reshape(len(shape), index.size).T


def parts(rows: np.ndarray, images: int) -> list[np.ndarray]:
    """Rows of faults in parts whose pairs with the images are few enough to list."""
    return np.array_split(rows, -(-rows.size * images // PAIRS))
