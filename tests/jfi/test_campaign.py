"""How much of a campaign is recorded at a time."""

import pytest

from jfi import campaign


@pytest.mark.parametrize(
    ("images", "measure", "faults"),
    [
        (100, "full", 2**19 // 100),  # so many pairs
        (10_000, "full", 256),  # the fewest
        (1, "full", 2**16),  # the most
        (100, "critical", 2**22 // 100),
        (10_000, "critical", campaign.PAYING),  # bounds of all images are made for each shard
        (10_000, "detect", campaign.PAYING),
    ],
)
def test_faults_of_a_shard(images, measure, faults):
    assert campaign.shard_size(images, measure) == faults
