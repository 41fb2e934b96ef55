"""Strata against faults listed one by one."""

import ml_dtypes
import numpy as np
import pytest

from jfi import bits
from jfi.errors import InputError
from jfi.faults import FaultSpace, Site
from jfi.sampling import strata

FORMATS = ("f4", "f2", ml_dtypes.bfloat16, "i1")


def leaves_of(dtype, sizes=(5, 12), seed=0):
    rng = np.random.default_rng(seed)
    return [(4 * rng.normal(size=n)).astype(dtype) for n in sizes]


def space_of(leaves, polarities=(0, 1)):
    sites = [Site(f"layer{i}", x.shape, x.dtype) for i, x in enumerate(leaves)]
    return FaultSpace(sites, polarities)


def changing(space, leaves):
    """Ids of the faults that change their word, by setting every bit."""
    faults = space.decode(np.arange(space.size))
    found = []
    for number, (s, i, b, p) in enumerate(zip(*faults, strict=True)):
        word = bits.to_bits(leaves[s])[i : i + 1]
        if bits.set_bit(word, int(b), int(p))[0] != word[0]:
            found.append(number)
    return found


def members(parts):
    """(stratum, id) of every fault of the strata."""
    h = np.repeat(np.arange(len(parts.size)), parts.size)
    k = np.concatenate([np.arange(n) for n in parts.size])
    return h, parts.ids(h, k)


@pytest.mark.parametrize("polarities", [(0, 1), (2,), (0,), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [np.dtype(d) for d in FORMATS], ids=str)
@pytest.mark.parametrize("split", [strata.by_cell, strata.by_distance])
def test_strata_hold_every_fault_that_changes_its_word_once(split, dtype, polarities):
    leaves = leaves_of(dtype)
    space = space_of(leaves, polarities)
    parts = strata.strata(space, leaves, split(space, leaves))
    h, ids = members(parts)
    assert sorted(ids.tolist()) == changing(space, leaves)
    faults = space.decode(ids)
    assert (faults.site == parts.site[h]).all()
    assert (faults.bit == parts.bit[h]).all()
    assert (parts.size > 0).all()


def test_groups_are_nested_and_constant_in_bins():
    leaves = leaves_of(np.dtype("f4"), (300, 900))
    space = space_of(leaves)
    for split in (strata.by_cell, strata.by_distance):
        parts = strata.strata(space, leaves, split(space, leaves))
        fine = np.arange(len(parts.size))
        for coarse in parts.groups:
            pairs = set(zip(fine.tolist(), coarse.tolist(), strict=True))
            assert len(pairs) == len(set(fine.tolist()))
            fine = coarse
        assert len(set(fine.tolist())) < len(parts.size)


def test_octaves_are_floors_of_logarithms_with_open_ends():
    score = np.array([0.0, 1e-30, 0.75, 1.0, 1.99, 2.0, 5.0, 1e30, np.inf, np.nan, -3.0])
    low, high = strata.OCTAVES
    expected = [low, low, -1, 0, 0, 1, 2, high - 1, high, high, low]
    assert (strata.octaves(score).astype(int) + low).tolist() == expected


def test_distances_are_those_of_the_flip():
    leaf = np.array([1.0, -2.0, 0.5], np.float32)
    assert strata.distances(leaf, 31).tolist() == [2, 4, 1]
    assert strata.distances(leaf, 23).tolist() == [0.5, 2.0, 0.5]
    assert not np.isfinite(strata.distances(leaf, 30)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_words_fall_where_the_flip_makes_them_less(dtype):
    """Word by word; a sign bit that is set turns infinity and NaN down."""
    leaf = np.array([1.0, -2.0, 0.0, -1.0, 3.0]).astype(dtype)
    for bit in range(8 * leaf.dtype.itemsize):
        for word, fell in zip(leaf, strata.falls(leaf, bit), strict=True):
            flipped = bits.faulty(word[None], bit, bits.FLIP)[0]
            if np.isnan(flipped):
                assert fell == np.signbit(flipped)
            else:
                assert fell == (float(flipped) < float(word))
    assert strata.falls(np.array([1.5, -1.5], np.float32), 30).tolist() == [0, 1]


def test_strata_by_distance_tell_both_ways_apart():
    leaf = np.array([0.75, -0.75], np.float32)
    split = strata.by_distance(space_of([leaf]), [leaf])
    for bit in range(32):
        up, down = split(0, bit)
        assert abs(int(up) - int(down)) == 1
        assert up // 2 == down // 2 == strata.octaves(strata.distances(leaf, bit))[0]


def test_a_score_is_distance_times_sensitivity_and_arrays_are_taken_as_they_are():
    leaves = leaves_of(np.dtype("f4"))
    growth, fall = 8.0, 0.5
    sensitivity = [np.stack([np.full(x.size, growth), np.full(x.size, fall)]) for x in leaves]
    scored = strata.by_score(leaves, sensitivity)
    way = strata.falls(leaves[1], 25)
    score = strata.distances(leaves[1], 25) * np.where(way == 1, fall, growth)
    assert (scored(1, 25) == strata.octaves(score) // 2 * 2 + way).all()
    scores = [np.random.default_rng(0).random((x.size, 32)) for x in leaves]
    expected = strata.octaves(scores[0][:, 7])
    assert (strata.by_array(scores)(0, 7) == expected).all()


def test_what_is_known_is_drawn_from_no_stratum():
    leaves = leaves_of(np.dtype("f4"))
    space = space_of(leaves)

    def split(site, bit):
        return np.where(np.arange(leaves[site].size) < 3, strata.KNOWN, 0).astype(np.uint8)

    parts = strata.strata(space, leaves, split)
    assert parts.size.sum() == 32 * (2 + 9)
    assert (space.decode(members(parts)[1]).index >= 3).all()


def test_what_is_proven_harmless_is_left_out_of_any_split():
    leaves = leaves_of(np.dtype("f4"))
    space = space_of(leaves)
    plain = strata.by_distance(space, leaves)

    def harmless(site, bit):
        return (np.arange(leaves[site].size) + bit) % 2 == 0

    split = strata.without(plain, harmless)
    for site, bit in ((0, 3), (1, 30)):
        safe = harmless(site, bit)
        assert (split(site, bit)[safe] == strata.KNOWN).all()
        assert np.array_equal(split(site, bit)[~safe], plain(site, bit)[~safe])
    faults = space.decode(members(strata.strata(space, leaves, split))[1])
    assert ((faults.index + faults.bit) % 2 == 1).all()
    assert faults.index.size == sum((~harmless(s, b)).sum() for s in (0, 1) for b in range(32))


def test_what_cannot_be_split_is_refused():
    leaves = leaves_of(np.dtype("f4"))
    space = space_of(leaves)
    with pytest.raises(InputError, match=r"bins of layer0 bit 0 are float64\[5\], not uint8\[5\]"):
        strata.strata(space, leaves, lambda site, bit: np.zeros(leaves[site].size))
    both = space_of(leaves, (0, 2))
    with pytest.raises(InputError, match="take one model"):
        strata.strata(both, leaves, strata.by_cell(both, leaves))
