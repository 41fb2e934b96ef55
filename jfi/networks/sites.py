"""A network brought by a user, and where faults can be put in it: parameters, named values."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jfi import bits, forms
from jfi.errors import InputError, kind
from jfi.faults import MODEL_SITES, Faults, Site, by_site
from jfi.hardware.devices import is_key
from jfi.networks import links, taps
from jfi.networks.program import Program, trace
from jfi.networks.taps import Tap
from jfi.networks.weights import products

_ARRAYS = (np.ndarray, np.generic, jax.Array)
_TOLD = 8  # most leaves that `told` names


class Network(NamedTuple):
    """A network ready for fault injection; made by `network`.

    apply: `(params, x [B, ...]) -> outputs [B, N]`, as given, in full precision. Where it takes
    several arrays x are their bytes (`inputs`), else `inputs` is None; outputs are laid out in rows
    (`outputs`).
    params: its parameters, as given but for leaves that are no arrays, which `apply` holds fixed;
    leaves: the same as a flat tuple.
    program: its equations for one image.
    sites: every leaf that has bits and that the logits depend on, in order of first use; then every
    run-time value the network names (`jfi.networks.taps`), as a site of permanent faults.
    kernels: names of the sites that enter a convolution or a matrix product as its weight.
    left_out: the leaves that are no sites, by name, and why: random keys, say, and bool, complex
    and int4 arrays have no words to break; on others the logits do not depend.
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    leaves: tuple[Any, ...]
    program: Program
    sites: tuple[Site, ...]
    kernels: frozenset[str]
    positions: dict[str, int]  # site name -> number of its leaf
    taps: dict[str, Tap]  # name -> run-time value
    left_out: dict[str, str]  # name -> why
    inputs: forms.Inputs | None
    outputs: forms.Outputs
    scores: Any  # variable of the outputs before the network's own softmax (`jfi.networks.links`)

    @property
    def parameters(self) -> tuple[Site, ...]:
        """The sites that are parameters."""
        return tuple(site for site in self.sites if site.name in self.positions)

    def source(self, site: Site) -> int | Tap:
        """Where a site is: the number of its parameter leaf, or the run-time value."""
        if site.name in self.positions:
            return self.positions[site.name]
        return self.taps[taps.parse(site.name)[0]]

    def leaves_of(self, sites: Iterable[Site]) -> list[np.ndarray | None]:
        """The golden values of each site; None of a run-time value."""
        return [self.values(site) if site.name in self.positions else None for site in sites]

    def values(self, site: Site) -> np.ndarray:
        """The golden values of a parameter, as NumPy.

        Raises:
          InputError: the site is a run-time value.
        """
        if site.name not in self.positions:
            raise InputError(
                f"site {site.name} is a run-time value: it has no golden value to choose faults "
                "by. Leave it out, or take any sampler but data_aware"
            )
        return np.asarray(self.leaves[self.positions[site.name]])


def network(
    apply: Callable[[Any, Any], Any], params: Any, image: Any, output: str | None = None
) -> Network:
    """Read a network without editing it.

    Args:
      apply: `(params, x) -> outputs`, any JAX function; images independent. x is an array
        [B, ...], or a tree of them (a dict, a tuple, ...): what the first axis of each counts are
        called images. So may outputs be.
      params: pytree of arrays; site names are its paths, `conv1/kernel` (without `params/`). One
        array alone is called `params`. Leaves that are no arrays (numbers of Python, strings,
        functions, None) reach `apply` as they are, and are no sites.
      image: one image without the batch axis: an array or a `jax.ShapeDtypeStruct`, or a tree.
      output: the name of the one array to judge faults by, where several are returned: its path,
        `logits` or `heads/0`. By default all.

    Raises:
      InputError: a parameter that is an array of objects or of another library, not finite or of
        64 bits without x64, no parameter with bits, two parameters of one name, a name with an @,
        a named value called as a parameter, an `image` that is no array of numbers, or an `apply`
        that is no function or does not return arrays of real numbers with the axis of images
        first; no output of that name.
    """
    if not callable(apply):
        raise InputError(f"apply is {kind(apply)}; it must be a function of (params, images)")
    inputs, image = _check_image(image)
    stored = _named(params)
    static = {name: leaf for name, leaf in stored.items() if _is_static(leaf)}
    arrays = {name: leaf for name, leaf in stored.items() if name not in static}
    if not arrays:
        raise InputError(f"params are {kind(params)} and hold no array")
    for name, leaf in arrays.items():
        _check_array(name, leaf)
    names, leaves = list(arrays), tuple(arrays.values())
    apply, params = _held_fixed(_full_precision(apply), params)
    if inputs is not None:
        apply = _unpacked(apply, inputs)
    apply, outputs = _in_rows(apply, params, image, output)
    program = trace(apply, params, image)
    link, scores = links.find(program, outputs.arrays[0].shape[-1] if outputs.is_scores else 0)
    used = _used(program)
    positions = {names[number]: number for number in used if bits.has_words(leaves[number].dtype)}
    left_out = {
        name: f"{leaf.dtype} words can't be broken" if k in used else "the logits do not need it"
        for k, (name, leaf) in enumerate(zip(names, leaves, strict=True))
        if name not in positions
    } | {name: f"{kind(leaf)}, held fixed" for name, leaf in static.items()}
    sites = tuple(
        Site(name, tuple(leaves[n].shape), np.dtype(leaves[n].dtype))
        for name, n in positions.items()
    )
    if not sites:
        why = f"; left out: {told(left_out)}" if left_out else ""
        raise InputError(f"params hold no array with bits that the logits depend on{why}")
    named = taps.find(program)
    both = [name for name in named if name in positions]
    if both:
        raise InputError(f"a parameter and a named value are both called {both[0]}: rename one")
    weights = {number for number, _ in products(program)}
    found = Network(
        apply, params, leaves, program, (*sites, *map(taps.site, named.values())),
        frozenset(name for name, n in positions.items() if n in weights), positions, named,
        left_out, inputs, outputs._replace(link=link), scores,
    )  # fmt: skip
    for site in sites:
        _check_dtype(site, program.leaves[positions[site.name]].aval.dtype)
        _check_finite(site.name, found.values(site))
    return found


def select(
    network: Network, pattern: str | None = None, fault_model: str = "stuck_at"
) -> tuple[Site, ...]:
    """Sites by name: those a regular expression matches in full.

    With `@step` or `@37` after it, run-time values, for transient faults (`jfi.networks.taps`).
    Without a pattern, those that the fault model is of (`jfi.faults.MODEL_SITES`), or the kernels.

    Raises:
      InputError: the pattern is no regular expression or matches no site, or only leaves that
        are left out; a step that a value does not have.
    """
    usual = pattern is None and fault_model in MODEL_SITES
    pattern = MODEL_SITES[fault_model] if usual else pattern
    if pattern is None:
        return tuple(site for site in network.sites if site.name in network.kernels)
    of, when = taps.parse(pattern)
    known = network.sites if when is None else [taps.site(tap) for tap in network.taps.values()]
    try:
        found = tuple(site for site in known if re.fullmatch(of, site.name))
    except re.error as error:
        raise InputError(f"sites {pattern!r} is not a regular expression: {error}") from None
    if not found:
        what = "sites" if when is None else "run-time values"
        names = ", ".join(site.name for site in known) or "none"
        if usual:
            raise InputError(
                f"fault model {fault_model} breaks sites called {of}, and there is none; name the "
                f"run-time values so (jax.ad_checkpoint.checkpoint_name), or choose among {names}"
            )
        unfit = {name: why for name, why in network.left_out.items() if re.fullmatch(of, name)}
        if unfit and when is None:
            raise InputError(f"sites {pattern!r} matches only what is left out: {told(unfit)}")
        raise InputError(f"sites {pattern!r} matches no site in full; the {what} are {names}")
    if when is None:
        return found
    return tuple(taps.site(network.taps[site.name], when) for site in found)


def told(left_out: Mapping[str, str]) -> str:
    """The leaves that are left out and why, in one line."""
    each = [f"{name} ({why})" for name, why in left_out.items()]
    more = [f"{len(each) - _TOLD} more"] if len(each) > _TOLD else []
    return ", ".join(each[:_TOLD] + more)


class Beside(NamedTuple):
    """Parameters that are sites, but not among the chosen ones, grouped by their last name.

    name: `bias`, `scale`, `embedding`; numbers in it are `#`. leaves, words: how many of them.
    share: of the bits of all parameters that are sites.
    """

    name: str
    leaves: int
    words: int
    share: float


def beside(network: Network, chosen: Iterable[Site]) -> list[Beside]:
    """What is stored, and needed for the logits, beside the chosen sites; the largest first.

    Nothing where these are run-time values alone: of parameters they say nothing.
    """
    names = {site.name for site in chosen}
    if names.isdisjoint(network.positions):
        return []
    groups: dict[str, list[Site]] = {}
    for site in network.parameters:
        if site.name not in names:
            groups.setdefault(_last_name(site.name), []).append(site)
    total = sum(site.words * site.width for site in network.parameters)
    found = [
        Beside(
            name, len(own), sum(site.words for site in own),
            sum(site.words * site.width for site in own) / total,
        )
        for name, own in groups.items()
    ]  # fmt: skip
    return sorted(found, key=lambda group: -group.share)


def _last_name(name: str) -> str:
    """`bias` of `conv1/bias` and `conv1.bias`; `hidden` of `hidden/1`; `Add_#` of `Add_12`."""
    parts = [part for part in re.split(r"[/.:]+", name) if re.search(r"[^\W\d_]", part)]
    return re.sub(r"\d+", "#", parts[-1] if parts else name)


def told_beside(found: Iterable[Beside | Mapping[str, Any]]) -> str:
    """The parameters beside the chosen sites in one sentence, with how to choose them too."""
    groups = [group if isinstance(group, Beside) else Beside(**group) for group in found]
    each = [
        f"{g.name} ({g.leaves:,} {'leaf' if g.leaves == 1 else 'leaves'}, {g.words:,} "
        f"{'word' if g.words == 1 else 'words'}, {_percent(g.share)})"
        for g in groups[:_TOLD]
    ]
    if later := groups[_TOLD:]:
        more = sum(g.leaves for g in later), sum(g.words for g in later), _total(later)
        each.append("{:,} more leaves ({:,} words, {})".format(*more))
    of = groups[0].name.replace("#", ".*")
    return (
        f"parameters beside these sites, {_total(groups)} of all their bits: {', '.join(each)}; "
        f"--sites (in Python sites=) takes them too, `.*` all, `.*{of}.*` those of the first name"
    )


def _total(groups: Iterable[Beside]) -> str:
    return _percent(sum(group.share for group in groups))


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else f"{share:.1e}"


def listable(network: Network) -> tuple[Site, ...]:
    """What a fault list may name: every site, and run-time values at one step (`NAME@step`)."""
    transient = (taps.site(tap, taps.DRAWN) for tap in network.taps.values())
    return (*network.sites, *transient)


def unchanged(network: Network, sites: Sequence[Site], faults: Faults) -> np.ndarray:
    """bool [F]: the fault in a parameter leaves its word as it is."""
    same = np.zeros(faults.site.size, bool)
    for number, rows in by_site(faults, np.arange(faults.site.size)):
        if sites[number].name in network.positions:
            golden = network.values(sites[number]).ravel()[faults.index[rows]]
            faulty = bits.faulty(golden, faults.bit[rows], faults.polarity[rows])
            same[rows] = bits.to_bits(golden) == bits.to_bits(faulty)
    return same


def golden_words(network: Network, sites: Sequence[Site], faults: Faults) -> np.ndarray:
    """uint64 [F]: the word that each fault breaks, as it is without; 0 of a run-time value."""
    words = np.zeros(faults.site.size, np.uint64)
    for number, rows in by_site(faults, np.arange(faults.site.size)):
        if sites[number].name in network.positions:
            golden = network.values(sites[number]).ravel()[faults.index[rows]]
            words[rows] = bits.to_bits(golden)
    return words


def check_sites(network: Network, sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites, where all are the network's own.

    Raises:
      InputError: one that the network does not have, or has of another shape or dtype.
    """
    known = {site.name: site for site in listable(network)}
    if isinstance(sites, Site) or not isinstance(sites, Iterable):
        raise InputError(f"sites are {kind(sites)}, not several jfi.Site: choose with jfi.select")
    sites = tuple(sites)
    for site in sites:
        if not isinstance(site, Site):
            raise InputError(f"sites hold {kind(site)}, not a jfi.Site: choose with jfi.select")
        of, when = taps.parse(site.name)
        tap = network.taps.get(of) if when is not None else None
        own = known.get(site.name) if tap is None else taps.site(tap, when)
        if own is None:
            raise InputError(f"the network has no site {site.name}; it has {', '.join(known)}")
        if own != site:
            raise InputError(f"the network's {site.name} is {_form(own)}, not {_form(site)}")
    return sites


def _form(site: Site) -> str:
    return f"{np.dtype(site.dtype).name}{list(site.shape)}"


def _full_precision(apply):
    # GPUs and TPUs otherwise compute float32 products in fewer bits.
    def full(params, x):
        with jax.default_matmul_precision("float32"):
            return apply(params, x)

    return full


def _unpacked(apply, inputs: forms.Inputs):
    """The function of the bytes of its inputs."""
    return lambda params, rows: apply(params, inputs.unpack(rows))


def _in_rows(apply, params: Any, image: jax.ShapeDtypeStruct, output: str | None):
    """The function that lays out what this returns in rows [B, N], and their form."""

    def wanted(params, x):
        found = forms.plain(apply(params, x))
        return found if output is None else forms.chosen(found, output)

    seen: list[forms.Outputs] = []

    def look(params, x):
        seen.append(forms.outputs(wanted(params, x)))

    one = jax.ShapeDtypeStruct((1, *image.shape), image.dtype)
    jax.eval_shape(look, params, one)
    outputs = seen[-1]
    return (lambda params, x: outputs.row(wanted(params, x))), outputs


def _named(params) -> dict[str, Any]:
    """The leaves by name, None among them.

    Raises:
      InputError: two of one name, as parts of a path are joined; a name with an @.
    """
    found: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=lambda leaf: leaf is None):
        name = _name(path)
        if name in found:
            one, other = (jax.tree_util.keystr(p) for p in (paths[name], path))
            raise InputError(f"params{one} and params{other} are both called {name}: rename one")
        if "@" in name:
            raise InputError(f"parameter {name} has an @, which stands before a step: rename it")
        found[name], paths[name] = leaf, path
    return found


def _held_fixed(apply, params):
    """A function of the arrays alone, which puts all other leaves in their places, and the arrays.

    They stay as they are: a tree without them is one whose structure lacks them.
    """
    given, tree = jax.tree.flatten(params)
    if not any(map(_is_static, given)):
        return apply, params
    arrays = jax.tree.unflatten(tree, [None if _is_static(leaf) else leaf for leaf in given])

    def filled(arrays, x):
        left = iter(jax.tree.leaves(arrays))
        leaves = [leaf if _is_static(leaf) else next(left) for leaf in given]
        return apply(jax.tree.unflatten(tree, leaves), x)

    return filled, arrays


def _is_static(leaf) -> bool:
    """Whether a leaf is no array, of JAX and NumPy or of any other library."""
    is_array = isinstance(leaf, _ARRAYS) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))
    return isinstance(leaf, type) or not is_array


def _name(path) -> str:
    """`conv1/kernel` from a pytree path; Flax's leading `params` says nothing and goes."""
    parts = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    if len(parts) > 1 and parts[0] == "params":
        parts = parts[1:]
    if len(parts) > 1 and parts[-1] == "value":  # Flax NNX variables
        parts = parts[:-1]
    return "/".join(parts) or "params"


def _used(program: Program) -> list[int]:
    """Numbers of the leaves that the logits depend on, in order of first use."""
    numbers = {var: number for number, var in enumerate(program.leaves)}
    atoms = [atom for eqn in program.eqns for atom in eqn.invars]
    found = [numbers[a] for a in atoms if not isinstance(a, core.Literal) and a in numbers]
    return list(dict.fromkeys(found))


def _check_image(image) -> tuple[forms.Inputs | None, jax.ShapeDtypeStruct]:
    """Shape and dtype of the image; of several arrays, their form and that of their bytes."""
    if isinstance(image, (*_ARRAYS, jax.ShapeDtypeStruct)) and _is_numeric(image.dtype):
        return None, jax.ShapeDtypeStruct(image.shape, image.dtype)
    leaves = jax.tree.leaves(image)
    if not leaves or (not isinstance(image, Mapping | tuple | list) and leaves == [image]):
        raise InputError(
            f"image is {kind(image)}; it must be an array of numbers or a jax.ShapeDtypeStruct, "
            "or a dict, tuple or list of them"
        )
    inputs = forms.inputs(image)
    return inputs, jax.ShapeDtypeStruct((inputs.size,), np.uint8)


def _check_array(name: str, leaf) -> None:
    """Other libraries' arrays, and shapes without values, would fail deep inside."""
    if not isinstance(leaf, _ARRAYS) or not (is_key(leaf) or _is_numeric(leaf.dtype)):
        raise InputError(
            f"parameter {name} is {kind(leaf)} ({type(leaf).__name__}); arrays in params must be "
            "NumPy or JAX arrays of numbers. Make it one, or leave it out of params and close over "
            "it in apply"
        )


def _is_numeric(dtype) -> bool:
    return jax.numpy.issubdtype(dtype, np.number) or dtype == np.dtype(bool)


def _check_dtype(site: Site, computed) -> None:
    """Without x64 JAX would quietly compute 64-bit words in 32, and have other bits to break."""
    if site.dtype != computed:
        raise InputError(
            f"parameter {site.name} is {site.dtype}, but JAX as it is set computes it as "
            f"{computed}: enable jax_enable_x64, or cast it"
        )


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.issubdtype(values.dtype, np.integer):
        bad = np.flatnonzero(~np.isfinite(values.astype(np.float64)))
        if bad.size:
            raise InputError(
                f"parameter {name} is {values.ravel()[bad[0]]} at index {bad[0]}; "
                "golden parameters must be finite"
            )
