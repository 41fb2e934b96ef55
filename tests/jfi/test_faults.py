import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfi.bits import POLARITIES
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS, Faults, FaultSpace, Site, fault_list, read_fault_list

SITES = [Site("conv1/kernel", (3, 2), np.dtype("f4")), Site("scale", (4,), np.dtype("i1"))]
DTYPES = [np.dtype(d) for d in ("i1", "f2", ml_dtypes.bfloat16, "f4", "f8")]


@st.composite
def spaces(draw):
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    kinds = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=4))
    sites = [Site(f"site{i}", shape, dtype) for i, (shape, dtype) in enumerate(kinds)]
    widest = max(site.width for site in sites)
    subset = st.lists(st.integers(0, widest - 1), min_size=1, max_size=4, unique=True)
    polarities = draw(st.sampled_from([*FAULT_MODELS.values(), (0, 1, 2)]))
    return FaultSpace(sites, polarities, draw(st.none() | subset))


def listed(space):
    """Every fault of the space, by four nested loops."""
    return [
        (s, index, bit, polarity)
        for s, site in enumerate(space.sites)
        for index in range(site.words)
        for bit in range(site.width)
        if bit in space.bits
        for polarity in space.polarities
    ]


def rows(faults):
    return list(zip(*(field.tolist() for field in faults), strict=True))


def as_faults(*row):
    return Faults(*(np.array([value]) for value in row))


@given(spaces())
def test_ids_number_the_faults_site_index_bit_polarity(space):
    faults = space.decode(np.arange(space.size))
    assert rows(faults) == listed(space)
    assert [f.dtype for f in faults] == [np.int32, np.int64, np.int16, np.int8]


@given(spaces())
def test_encode_is_the_inverse_of_decode(space):
    ids = np.arange(space.size)
    assert np.array_equal(space.encode(space.decode(ids)), ids)


@given(spaces())
def test_cells_count_the_faults(space):
    faults = listed(space)
    assert space.cells.sum() == space.site_sizes.sum() == space.size == len(faults)
    assert space.cells.dtype == space.site_sizes.dtype == np.int64
    for (s, bit), cell in np.ndenumerate(space.cells):
        assert cell == sum(f[0] == s and f[2] == bit for f in faults)


@given(spaces())
def test_strata_hold_the_faults_decode_puts_there(space):
    faults = space.decode(np.arange(space.size))
    for site, bit in itertools.product(
        (None, *range(len(space.sites))), (None, *range(space.cells.shape[1]))
    ):
        here = np.full(space.size, True)
        if site is not None:
            here &= faults.site == site
        if bit is not None:
            here &= faults.bit == bit
        size = space.stratum_size(site, bit)
        ids = space.stratum_ids(site, bit, np.arange(size))
        assert ids.tolist() == np.flatnonzero(here).tolist()


@given(
    ids=st.lists(st.integers(0, 10**12 + 223), min_size=1),
    k=st.integers(0, 10**12 // 32 - 1),
)
def test_a_space_of_10_to_the_12_costs_nothing(ids, k):
    tracemalloc.start()
    sites = [Site("small", (7,), np.dtype("f2")), Site("large", (10**6, 15625), np.dtype("f4"))]
    space = FaultSpace(sites, FAULT_MODELS["stuck_at"])
    assert space.size == 7 * 16 * 2 + 10**12
    faults = space.decode(np.array(ids))
    assert space.encode(faults).tolist() == ids
    found = space.decode(space.stratum_ids(1, 30, k))
    assert (found.site, found.bit, found.index * 2 + found.polarity) == (1, 30, k)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_decode_and_encode_keep_the_shape_of_the_ids():
    space = FaultSpace(SITES, FAULT_MODELS["flip"])
    ids = np.arange(6).reshape(2, 1, 3)
    assert space.decode(ids).index.shape == (2, 1, 3)
    assert np.array_equal(space.encode(space.decode(ids)), ids)
    assert space.encode(space.decode(5)) == 5


def test_the_size_of_mobilenetv2_in_date23_table_ii():
    space = FaultSpace([Site("all", (2_203_584,), np.dtype("f4"))], FAULT_MODELS["stuck_at"])
    assert space.size == 141_029_376
    assert rows(space.decode(np.array([141_029_375]))) == [(0, 2_203_583, 31, 1)]


@pytest.mark.parametrize(
    ("sites", "polarities", "bits", "message"),
    [
        ([], (0, 1), None, "at least one site"),
        ([SITES[0], SITES[0]], (0, 1), None, "site 'conv1/kernel' is given more than once"),
        ([Site("mask", (3,), np.dtype(bool))], (0, 1), None, "dtype bool has no words"),
        (SITES, (), None, "polarity choice .* distinct integers from 0 to 4"),
        (SITES, (0, 5), None, "polarity choice .* from 0 to 4"),
        (SITES, (0, 1), (3, 3), "bit choice .* distinct integers from 0 to 31"),
        (SITES, (0, 1), (32,), "bit choice .* from 0 to 31"),
        ([Site("vast", (2**60,), np.dtype("f4"))], (0, 1), None, "too many to number"),
    ],
)
def test_bad_spaces_are_refused(sites, polarities, bits, message):
    with pytest.raises(InputError, match=message):
        FaultSpace(sites, polarities, bits)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((2, 0, 0, 0), "site 2 in row 0 is not in 0 to 1"),
        ((0, 6, 0, 0), "index 6 in row 0 is not in 0 to 5"),
        ((1, -1, 0, 0), "index -1 in row 0 is not in 0 to 3"),
        ((0, 0, 32, 0), "bit 32 in row 0 is none of"),
        ((1, 0, 8, 0), "bit 8 in row 0 is not in 0 to 7"),
        ((0, 0, 0, 2), r"polarity 2 in row 0 is none of \(0, 1\)"),
        ((0, 0.5, 0, 0), "index has dtype float64, not an integer dtype"),
    ],
)
def test_faults_outside_the_space_are_refused(fault, message):
    space = FaultSpace(SITES, FAULT_MODELS["stuck_at"])
    with pytest.raises(InputError, match=message):
        space.encode(as_faults(*fault))


def test_ids_outside_the_space_are_refused_by_row():
    space = FaultSpace(SITES, FAULT_MODELS["stuck_at"])
    with pytest.raises(InputError, match="fault id -1 in row 2 is not in 0 to 447"):
        space.decode(np.array([0, 447, -1]))
    with pytest.raises(InputError, match="fault id 448 in row 0 is not"):
        space.decode(np.array(448))
    with pytest.raises(InputError, match="conv1/kernel bit 3, number 12 in row 1 is not in"):
        space.stratum_ids(0, 3, np.array([0, 12]))
    with pytest.raises(InputError, match="bit 32 in row 0 is not in 0 to 31"):
        space.stratum_size(0, 32)
    with pytest.raises(InputError, match="site -1 in row 0 is not in 0 to 1"):
        space.stratum_ids(-1, None, 0)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_fault_list_is_read_in_order(tmp_path):
    path = write(
        tmp_path / "faults.csv",
        "site,index,bit,polarity",
        "scale,3,7,flip",
        "conv1/kernel, 0, 31, stuck_at_1",
        "",
        "scale,3,7,flip",
    )
    faults = read_fault_list(path, SITES)
    assert rows(faults) == [(1, 3, 7, 2), (0, 0, 31, 1), (1, 3, 7, 2)]
    assert [f.dtype for f in faults] == [np.int32, np.int64, np.int16, np.int8]


@given(spaces(), st.data())
def test_a_written_space_is_read_back(tmp_path_factory, space, data):
    if not space.size:
        return
    ids = np.array(data.draw(st.lists(st.integers(0, space.size - 1), min_size=1, max_size=5)))
    lines = (f"site{s},{i},{b},{POLARITIES[p]}" for s, i, b, p in rows(space.decode(ids)))
    path = write(tmp_path_factory.mktemp("list") / "f.csv", "site,index,bit,polarity", *lines)
    assert space.encode(read_fault_list(path, space.sites)).tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("conv2/kernel,0,0,flip", "no site 'conv2/kernel'; the sites are conv1/kernel, scale"),
        ("conv1/kernel,6,0,flip", "index of conv1/kernel is '6', not an integer from 0 to 5"),
        ("conv1/kernel,-1,0,flip", "'-1', not an integer from 0 to 5"),
        ("conv1/kernel,1.0,0,flip", "'1.0', not an integer"),
        ("conv1/kernel,1_0,0,flip", "'1_0', not an integer"),
        ("conv1/kernel,,0,flip", "'', not an integer"),
        ("conv1/kernel,0,32,flip", "bit of conv1/kernel is '32', not an integer from 0 to 31"),
        ("scale,0,8,flip", "bit of scale is '8', not an integer from 0 to 7"),
        ("scale,0,7,stuck", "polarity 'stuck' is none of stuck_at_0, stuck_at_1, flip"),
        ("scale,0,7", "3 cells, not the 4"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, message):
    path = write(tmp_path / "f.csv", "site,index,bit,polarity", "scale,0,0,flip", row)
    with pytest.raises(InputError, match=rf"f\.csv, line 3: .*{message}") as error:
        read_fault_list(path, SITES)
    assert "\n" not in str(error.value)


def test_a_fault_list_is_made_of_rows():
    sites = [*SITES, Site("one", (), np.dtype("f4"))]
    faults = fault_list(
        [
            ("scale", np.int64(3), 7, "flip"),
            ["conv1/kernel", (2, 1), np.int16(31), "stuck_at_1"],
            ("one", (), 0, "dead"),
        ],
        sites,
    )
    assert rows(faults) == [(1, 3, 7, 2), (0, 5, 31, 1), (2, 0, 0, 3)]
    assert [f.dtype for f in faults] == [np.int32, np.int64, np.int16, np.int8]
    assert fault_list([], sites).site.size == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("conv2/kernel", 0, 0, "flip"), "no site 'conv2/kernel'; the sites are conv1/kernel, sc"),
        ((0, 0, 0, "flip"), "no site 0; the sites are"),
        (("scale", 4, 0, "flip"), "index of scale is 4, not an integer from 0 to 3"),
        (("scale", -1, 0, "flip"), "index of scale is -1, not an integer"),
        (("scale", 1.0, 0, "flip"), "index of scale is 1.0, not an integer"),
        (("scale", None, 0, "flip"), "index of scale is None, not an integer"),
        (("conv1/kernel", (0, 2), 0, "flip"), "index of conv1/kernel, axis 1 is 2, .* 0 to 1"),
        (("conv1/kernel", (0,), 0, "flip"), r"is \(0,\), not 2 positions in \(3, 2\)"),
        (("scale", 0, 8, "flip"), "bit of scale is 8, not an integer from 0 to 7"),
        (("scale", 0, 0, 2), "polarity 2 is none of stuck_at_0, stuck_at_1, flip"),
        (("scale", 0, 0), "3 cells, not the 4"),
        ("scale", "fault 1 is str 'scale', not one of"),
    ],
)
def test_a_bad_row_is_named_by_its_number(row, message):
    with pytest.raises(InputError, match=message) as error:
        fault_list([("scale", 0, 0, "flip"), row], SITES)
    assert str(error.value).startswith("fault 1") and "\n" not in str(error.value)


def test_a_file_that_is_no_fault_list_is_refused(tmp_path):
    with pytest.raises(InputError, match="must be the header site,index,bit,polarity"):
        read_fault_list(write(tmp_path / "a.csv", "scale,0,0,flip"), SITES)
    with pytest.raises(InputError, match="must be the header"):
        read_fault_list(write(tmp_path / "b.csv"), SITES)
    with pytest.raises(InputError, match="has no faults below its header"):
        read_fault_list(write(tmp_path / "c.csv", "site,index,bit,polarity"), SITES)
    with pytest.raises(InputError, match=r"absent\.csv cannot be read"):
        read_fault_list(tmp_path / "absent.csv", SITES)
    (tmp_path / "d.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"d\.csv cannot be read"):
        read_fault_list(tmp_path / "d.csv", SITES)
