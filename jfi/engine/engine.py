"""The engine: outcomes of faults on a workload, many pairs at a time.

The unit of work is a list of (fault, image) pairs of one site, cut into chunks of one size so
that nothing recompiles. Two judges decide them (`jfi.engine.judge`): one runs every pair to the
logits; where only critical or not is asked, another runs pairs from cut to cut, and drops them when
proven. `jfi.engine.routes` estimates for every site which is the faster.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jfi import bits, outcomes
from jfi.criteria import built_in, names
from jfi.criteria.criterion import Criterion, Judgement
from jfi.engine.cut_to_cut import CutToCut
from jfi.engine.golden import golden_run
from jfi.engine.inputs import (
    check_images,
    check_labels,
    check_measure,
    check_order,
    check_screen,
)
from jfi.engine.judge import Case, Judge
from jfi.engine.radii import code, distance
from jfi.engine.to_logits import ToLogits
from jfi.engine.whole import Pairs, SiteProgram
from jfi.errors import InputError, kind
from jfi.faults import Faults, Site, by_site, check_faults, check_range, take
from jfi.hardware import tuning
from jfi.hardware.compiling import jit
from jfi.hardware.devices import Hardware
from jfi.networks.sites import Network, check_sites, unchanged
from jfi.outcomes import Outcomes

MEMORY = 1 << 30  # bytes of golden values kept on the device at a time


class Engine:
    """A network with its workload, golden run and compiled programs.

    Args:
      network: from `jfi.networks.sites.network`.
      images: [B, ...], preprocessed as the network takes them.
      labels: [B, ...] as the criterion takes them, of top1 int [B] in [0, C); None where there are
        none: golden answers stand for them.
      sites: the sites that faults name by position.
      memory: bytes of golden values kept on the device at a time; where all images do not fit
        they are taken in blocks.
      hardware: what to run on, by default all local devices.
      screen: a name of `jfi.engine.screen.REDUCED`: the measures critical and detect then run pairs
        in that precision first, and in full where it leaves a doubt.
      order: int [B], the order in which `detect` presents the images, by default those nearest to
        another answer first (the golden margin).
      criterion: what makes a fault critical for an image (`jfi.criteria`), or its name; by default
        that top-1 changes, of scores [B, C].
      loop: whether faults in parameters are run one by one through the whole network, always or
        never; by default where that is estimated to be faster, or was once timed to be.

    Raises:
      InputError: images or labels of the wrong shape or range; an order that does not name each
        image once; a golden output that is not finite, or that depends on the other images of the
        batch; an unknown screen, or one with `loop=True`.
    """

    def __init__(
        self,
        network: Network,
        images,
        labels,
        sites: tuple[Site, ...],
        *,
        memory: int = MEMORY,
        hardware: Hardware | None = None,
        screen: str | None = None,
        order: np.ndarray | None = None,
        loop: bool | None = None,
        criterion: Criterion | str | None = None,
    ):
        self.network, self.screen = network, check_screen(screen)
        self.hardware = tuning.usual() if hardware is None else hardware
        self.images = check_images(network, images)
        criterion = names.check(criterion) or names.usual(network.outputs, labels)
        self.criterion, self.by = criterion, criterion.judge(network.outputs)
        if labels is None and self.by.answer is None:
            self.by = self.by._replace(correct=None)  # no golden answers stand for labels
        if screen and criterion != built_in.TOP1:
            raise InputError(f"screen {screen!r} is for top1; criterion {criterion.text} has none")
        self.golden = golden_run(network, self.images)
        self.answers = _answers(self.by, self.golden.logits)
        given = (len(self.images), self.by, criterion.text)
        self.labels = self.answers if labels is None else check_labels(labels, *given)
        self.is_labelled = labels is not None
        self._right = _right(self.by, self.golden.logits, self.labels)
        self.order, self.is_ordered = check_order(order, self.golden, self.by), order is not None
        self.sites = check_sites(network, sites)
        if screen and loop:
            raise InputError(f"screen {screen!r} has no loop: leave loop=True out, or the screen")
        self._loop = loop
        workload = self.images, self.labels, self.by, self.golden, self.order
        self._case = Case(network, self.sites, *workload, self.hardware, memory)
        self._to_logits = ToLogits(self._case, screen, loop)
        screened = self._to_logits.screened if screen else None
        self._cut_to_cut = CutToCut(self._case, screened)

    def expect(self, faults: Mapping[int, int]) -> None:
        """Say how many faults there are to run in all, by site: ways are chosen for so many.

        Unsaid, they are chosen for each `run` by itself.
        """
        at_run_time = self._case.at_run_time
        self._case.ways.expect({k: n for k, n in faults.items() if not at_run_time[k]})

    def run(self, faults: Faults, measure: str = "full", *, keep_bits: bool = False) -> Outcomes:
        """Outcomes of F faults on all B images; takes F x B bytes of host memory meanwhile.

        Args:
          faults: their `site` is a position in `sites`.
          measure: `full` tells the class of every pair; `critical` whether it is critical, with
            certificates in place of inference where they hold; `detect` only whether the fault
            is critical for any image, and stops at the first block of images that shows it.
          keep_bits: also keep which images each fault is critical for, and masked if told.

        Raises:
          InputError: an unknown measure; `full` of an engine that screens; a fault that is none
            of the sites', naming its column and row (`jfi.faults.check_faults`).
        """
        self.check_measure(measure)
        faults = check_faults(faults, self.sites)
        codes = np.empty((faults.site.size, len(self.images)), np.uint8)
        # A fault that leaves its word as it is needs no run: masked, and top-1 is the golden one.
        codes[:] = np.where(self._right, outcomes.CORRECT, 0)
        told = np.zeros((2, faults.site.size), np.int32)  # images inferred, and certified
        todo = np.flatnonzero(~self.identity(faults))
        for judge, rows in self._judges(faults, todo, measure):
            told[:, rows] = judge.judge(faults, rows, codes, detect=measure == "detect")
        self._settle(codes)
        tally = outcomes.tally if measure == "full" else outcomes.tally_critical
        found = tally(codes, keep_bits)._replace(inferred=told[0], certified=told[1])
        if not self.tells_correct(measure):
            found = found._replace(correct=None)
        return self._detected(found, codes) if measure == "detect" else found

    def check_measure(self, measure: str) -> None:
        """Raises InputError for an unknown measure, or one that can't be told here."""
        check_measure(measure, self.screen)
        if measure == "detect" and self.by.points is not None:
            raise InputError(
                f"measure 'detect' ends at the first image, and criterion {self.criterion.text} is "
                "of all of them; measure 'critical' tells it"
            )

    def tells_correct(self, measure: str) -> bool:
        """Whether a measure tells on how many images a fault leaves what the labels say.

        A certificate that a fault is not critical need not say so much.
        """
        if self.by.correct is None:
            return False
        return measure == "full" or (measure == "critical" and self.by.keeps_answer)

    @property
    def accuracy(self) -> float:
        """Share of images that are correct without a fault."""
        return float(self._right.mean())

    def _settle(self, codes: np.ndarray) -> None:
        """Where a criterion is of the whole workload, faults that are not critical are for none."""
        if self.by.points is not None:
            lost = self._right.sum() - ((codes & outcomes.CORRECT) != 0).sum(axis=1)
            harmless = 100 * lost <= self.by.points * len(self.images)
            codes[harmless] &= ~np.uint8(outcomes.CRITICAL)

    def _judges(
        self, faults: Faults, rows: np.ndarray, measure: str = "critical"
    ) -> Iterator[tuple[Judge, np.ndarray]]:
        """Who decides which of the faults `rows`."""
        cut = np.zeros(rows.size, bool)
        if measure != "full":
            cut = np.isin(faults.site[rows], self._cut_sites(faults.site[rows]))
        for judge, own in ((self._to_logits, ~cut), (self._cut_to_cut, cut)):
            if own.any():
                yield judge, rows[own]

    def _cut_sites(self, sites: np.ndarray) -> list[int]:
        """The sites whose faults run from cut to cut, of those of F faults, int [F].

        No bound is known of what a run-time fault may do: it is run to the logits.
        """
        own = Counter(sites[~self._case.at_run_time[sites]].tolist())
        if self.by.constraints is None:
            return []
        if self.screen or self._loop is not None:
            return [] if self._loop else [*own]
        bounded = self._case.ways.bounded(own, lambda site: self.program(site).parts)
        return [site for site in own if site in bounded]

    def _detected(self, told: Outcomes, codes: np.ndarray) -> Outcomes:
        """What is known when a fault was dropped at the first images it was critical for."""
        hit = (codes[:, self.order] & outcomes.CRITICAL) != 0
        first = np.where(hit.any(axis=1), self.order[hit.argmax(axis=1)], -1)
        unsaid = dict.fromkeys(("non_finite", "correct", "critical_bits"))
        return told._replace(
            critical=(first >= 0).astype(np.int32), first_critical=first.astype(np.int32), **unsaid
        )

    def told(self, first: np.ndarray, image: np.ndarray, measure: str) -> np.ndarray:
        """int8 [P]: critical 1, not critical 0, unsaid -1, of P faults, each on one image.

        Args:
          first: int [P], the first image that each fault is critical for as `measure` told it, -1
            for none: it tells of the images up to that one.
        """
        order = self.order if measure == "detect" else np.arange(len(self.images))
        rank = np.argsort(order)
        before = (first < 0) | (rank[image] < rank[first])
        if self.by.points is not None:  # of a fault that is not critical no image is
            before &= first >= 0
        return np.where(image == first, 1, np.where(before, 0, -1)).astype(np.int8)

    def make_radii(self) -> None:
        """Make now what a long campaign of the measure `critical` comes to make: all radii, of a
        criterion that has constraints."""
        if self.by.constraints is not None:
            self._cut_to_cut.make_radii()

    def certified(self, site: int, bit: int, polarity: int = bits.FLIP) -> np.ndarray:
        """bool [words]: the fault, by default the flip, is proven critical for no image.

        The first call for a site makes its radii for all images.
        """
        golden = self.network.values(self.sites[site]).ravel()
        if self.by.constraints is None:
            return np.zeros(golden.size, bool)
        moved = distance(bits.faulty(golden, bit, polarity), golden)
        return code(moved) < self._cut_to_cut.least_radii(site)

    def critical_pairs(self, faults: Faults, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run P pairs as `critical` does: the k-th fault on image `image[k]`.

        Returns:
          Codes uint8 [P], of which only the flags count, and bool [P], certified. Radii are used
          whether they pay or not: this is for verifying them.

        Raises:
          InputError: as of `pairs`.
        """
        faults, image = self.check_pairs(faults, image)
        codes = np.zeros((image.size, len(self.images)), np.uint8)
        only = np.zeros(codes.shape, bool)
        pair = np.arange(image.size), image
        only[pair] = True
        certified = np.zeros(image.size, bool)
        for judge, rows in self._judges(faults, pair[0]):
            certified[rows] = judge.judge(faults, rows, codes, only=only)[1] > 0
        return codes[pair], certified

    def pairs(self, faults: Faults, image: np.ndarray, *, reduced: bool = False) -> Pairs:
        """Run P pairs to the logits: the k-th fault on image `image[k]`, whatever it does.

        Args:
          reduced: in the precision of the screen.

        Raises:
          InputError: a fault that is none of the sites', or an image that there is not, naming
            column and row; not one image a fault.
        """
        return self._to_logits.pairs(*self.check_pairs(faults, image), reduced=reduced)

    def check_pairs(self, faults: Faults, image) -> tuple[Faults, np.ndarray]:
        """P faults and their images int64 [P], checked. Raises InputError as `pairs` does."""
        faults = check_faults(faults, self.sites)
        image = check_range("image", image, len(self.images))
        if image.shape != faults.site.shape:
            raise InputError(
                f"images {kind(image)} are not one a fault: there are {faults.site.size} faults"
            )
        return faults, image

    def identity(self, faults: Faults) -> np.ndarray:
        """bool [F]: the fault leaves its word as it is; not known of run-time values.

        Raises:
          InputError: as of `run`.
        """
        return unchanged(self.network, self.sites, check_faults(faults, self.sites))

    def subnormal(self, faults: Faults) -> np.ndarray:
        """bool [F]: the faulty word is subnormal (`bits.is_subnormal`); not known at run time."""
        found = np.zeros(faults.site.size, bool)
        for number, rows in by_site(faults, np.flatnonzero(~self._case.at_run_time[faults.site])):
            found[rows] = bits.is_subnormal(self._case.change(number, take(faults, rows))[0])
        return found

    def program(self, site: int) -> SiteProgram:
        """The compiled programs of a site, by its position in `sites`."""
        return self._to_logits.program(site)


def _answers(by: Judgement, logits: np.ndarray) -> np.ndarray:
    """int32 [B, ...]: golden answers, in the form of labels; zeros where there are none."""
    if by.answer is None:
        return np.zeros(len(logits), np.int32)
    return np.asarray(jit(jax.vmap(by.answer))(logits))


def _right(by: Judgement, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool [B]: outputs [B, N] are what labels say; False where labels say nothing."""
    if by.correct is None:
        return np.zeros(len(logits), bool)
    return np.asarray(jit(jax.vmap(by.correct))(logits, labels))
