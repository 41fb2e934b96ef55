"""Images that should find most critical faults, foreseen from gradients: no fault is run.

To first order a change dw of a word moves the golden margin m of an image, the largest logit less
the second, by dw times its gradient g. r = -dw g / m is that move as a share of the margin: near 1
the fault begins to be critical for the image. We take the chance that it is as r / (1 + r), with
r from 0 to `LIMIT`: large changes are not of first order, and no fault is taken for certain. (With
the margins over all other classes, as in `jfi.networks.scores`, LeNets took more images, not
fewer.)

Images are then taken greedily, always the one that adds most to the expected number of critical
faults found: Kennard-Stone for faults in place of distances, and the set cover of
`jfi.campaign.detection.set_cover` with chances in place of verdicts. The faults are a random sample
of flips of their own, so that a workload does not depend on the sample it is used for.
"""

import heapq
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jfi import bits
from jfi.criteria.criterion import Judgement
from jfi.engine.radii import distance
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, Site
from jfi.hardware.chunks import chunks, filled_up
from jfi.hardware.compiling import jit
from jfi.networks import scores
from jfi.networks.sites import Network
from jfi.sampling.sampling import Sample, Stratum

FAULTS = 1 << 15  # flips that images are judged by; of 8,192, the order depends on which
LIMIT = 9.0  # of r: no chance is above 0.9
_LEAST = 0.1  # of a fault's largest chance: others find nothing
_MEMORY = 1 << 27  # bytes of gradients held at a time


def chances(
    network: Network,
    images: np.ndarray,
    sites: Sequence[Site],
    by: Judgement,
    faults: int = FAULTS,
    seed: int = 0,
) -> np.ndarray:
    """float32 [F, B]: the chance that each of F flips of a random sample is critical, by image.

    Flips that are far from critical on every image are left out.

    Args:
      images: [B, ...], preprocessed as the network takes them.
      sites: those to put faults in; those of integers have no gradient and are passed over, and so
        are run-time values.
      by: what is critical, with constraints.
      faults: size of the sample; where there are fewer flips, all of them.
    """
    known = (site for site in sites if site.name in network.positions)
    chosen = [site for site in known if jnp.issubdtype(site.dtype, jnp.floating)]
    flips = _sample(FaultSpace(chosen, FAULT_MODELS["flip"]), faults, seed)
    run = jit(jax.vmap(partial(_moves, network, chosen, flips, by), (None, 0)))
    words = sum(site.words for site in chosen)
    size = int(np.clip(_MEMORY // (4 * words), 1, len(images)))
    parts = (filled_up(images[part], size) for part in chunks(len(images), size))
    by_image = np.concatenate([_chance(run(network.leaves, part)) for part in parts])[: len(images)]
    near = by_image.max(axis=0, initial=0) > _LEAST
    return by_image[:, near].T.astype(np.float32)


def _chance(moves) -> np.ndarray:
    """float16, for the memory of many faults on many images."""
    r = np.clip(np.nan_to_num(np.asarray(moves), nan=LIMIT), 0, LIMIT)
    return (r / (1 + r)).astype(np.float16)


def _sample(space: FaultSpace, faults: int, seed: int) -> Faults:
    size = min(faults, space.size)
    return space.decode(
        Sample(space, (Stratum(None, None, space.size, size, 0.5),), seed).ids(0, size)
    )


def _moves(network: Network, sites: Sequence[Site], faults: Faults, by: Judgement, leaves, image):
    """[F]: by what share of an image's margin each fault lowers it, to first order."""
    positions = [network.positions[site.name] for site in sites]
    rows = [np.flatnonzero(faults.site == number) for number in range(len(sites))]
    changes = [_change(network, s, faults, own) for s, own in zip(sites, rows, strict=True)]

    def lowered(found, slopes):
        for slope, own, change in zip(slopes, rows, changes, strict=True):
            found = found.at[own].set(-change * slope.ravel()[faults.index[own]])
        return found

    run = scores.over_rivals(network, positions, lowered, rivals=1, by=by)
    return run(jnp.zeros(faults.site.size), [leaves[p] for p in positions], image)


def _change(network: Network, site: Site, faults: Faults, rows: np.ndarray) -> np.ndarray:
    """float32 [f]: faulty value less golden, of faults `rows` in one site."""
    golden = network.values(site).ravel()[faults.index[rows]]
    faulty = bits.faulty(golden, faults.bit[rows], faults.polarity[rows])
    far = np.minimum(distance(faulty, golden), np.finfo(np.float32).max)
    return np.where(faulty < golden, -far, far).astype(np.float32)


def found_at(chances: np.ndarray) -> np.ndarray:
    """[B]: the share of the F faults that each image adds to those expected found before it.

    Of `chances` [F, B], images taken greedily. Values never rise from one choice to the next, so
    the highest first is the order of choice.
    """
    by_image = np.ascontiguousarray(chances.T)
    left = np.ones(len(chances), np.float32)
    found = np.zeros(len(by_image))
    # What an image adds only falls as others are taken: an old value is a bound on it.
    queue = [(-float(gain), image) for image, gain in enumerate(by_image @ left)]
    heapq.heapify(queue)
    highest = np.inf
    while queue:
        _, image = heapq.heappop(queue)
        gain = float(by_image[image] @ left)
        if queue and -gain > queue[0][0]:
            heapq.heappush(queue, (-gain, image))
            continue
        highest = min(highest, gain)
        found[image] = highest
        left *= 1 - by_image[image]
    return found / max(len(chances), 1)
