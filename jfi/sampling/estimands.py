"""What a campaign estimates: the mean over faults of a number in [0, 1] that every fault has.

| estimate | the outcome of a fault | its mean over faults |
| --- | --- | --- |
| `faults` | 1 if it is critical on at least one image, else 0 | share of critical faults |
| `pairs` | critical images / B | share of (fault, image) pairs that are critical |
| `accuracy` | correct images / B | mean accuracy under fault |

Images of one fault are not independent, and faults are what is drawn: the fault is the sampling
unit (a cluster of B pairs), and its outcome one number. Statistics in this folder take any outcome
in [0, 1]. The sizes of samples stay safe: of all of them a fault that is critical or not, half and
half, has the largest variance, 1/4, which is what p = 0.5 stands for in the papers' formula.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jfi.errors import InputError

FAULTS, PAIRS, ACCURACY = "faults", "pairs", "accuracy"
WORDS = {
    FAULTS: "share of critical faults",
    PAIRS: "share of (fault, image) pairs that are critical",
    ACCURACY: "mean accuracy under fault, % of images",
}
_COLUMN = {PAIRS: "critical", ACCURACY: "correct"}  # of a shard, in images


class Estimand(NamedTuple):
    """What is estimated, and what is known of it before a fault is run.

    parts: outcomes are whole numbers of 1 / parts, so many images; 0: any numbers.
    unchanged: the outcome of a fault that changes nothing.
    """

    name: str = FAULTS
    parts: int = 1
    unchanged: float = 0.0

    def counts(self, shard: Mapping[str, np.ndarray]) -> np.ndarray:
        """Outcomes int64 [F] in 1 / parts, of the columns of a shard."""
        if self.name == FAULTS:
            return (shard["first_critical"] >= 0).astype(np.int64)
        return shard[_COLUMN[self.name]].astype(np.int64)


CRITICAL = Estimand()  # the share of critical faults


def estimand(name: str, images: int, golden_accuracy: float | None = None) -> Estimand:
    """The estimand of a name of `WORDS`, on B images."""
    if name == FAULTS:
        return CRITICAL
    return Estimand(name, images, float(golden_accuracy) if name == ACCURACY else 0.0)


def check(name: str, measure: str, labelled: bool) -> str:
    """``name`` as it is.

    Raises:
        InputError: an unknown estimate, one that the measure does not tell, or accuracy without
            labels.
    """
    if name not in tuple(WORDS):
        raise InputError(f"estimate {name!r} is unknown; choose from {', '.join(WORDS)}")
    if name != FAULTS and measure == "detect":
        raise InputError(
            f"estimate {name!r} counts images, and measure 'detect' tells only one; take the "
            "measure 'critical' or 'full'"
        )
    if name == ACCURACY and not labelled:
        raise InputError(
            "estimate 'accuracy' needs labels, and there are none; give them, or estimate 'pairs': "
            "answers that change, right or wrong"
        )
    return name
