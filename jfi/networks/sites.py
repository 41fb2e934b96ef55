"""A network brought by a user, and where faults can be put in it: parameters, named values."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jfi import bits, forms
from jfi.errors import InputError, kind
from jfi.faults import MODEL_SITES, Faults, Site, by_site
from jfi.hardware.devices import is_key
from jfi.networks import links, scans, taps
from jfi.networks.program import PRODUCTS, Program, dependents, trace
from jfi.networks.taps import Tap

_ARRAYS = (np.ndarray, np.generic, jax.Array)
_TOLD = 8  # most leaves that `told` names


class Network(NamedTuple):
    """A network ready for fault injection; made by `network`.

    apply: `(params, x [B, ...]) -> outputs [B, N]`, as given, in full precision. Where it takes
    several arrays x are their bytes (`inputs`), else `inputs` is None; outputs are laid out in rows
    (`outputs`).
    params: its parameters, as given; leaves: the same as a flat tuple.
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
        array alone is called `params`.
      image: one image without the batch axis: an array or a `jax.ShapeDtypeStruct`, or a tree.
      output: the name of the one array to judge faults by, where several are returned: its path,
        `logits` or `heads/0`. By default all.

    Raises:
      InputError: a parameter that is no array, not finite or of 64 bits without x64, no parameter
        with bits, two parameters of one name, a name with an @, a named value called as a
        parameter, an `image` that is no array of numbers, or an `apply` that is no function or does
        not return arrays of real numbers with the axis of images first; no output of that name.
    """
    if not callable(apply):
        raise InputError(f"apply is {kind(apply)}; it must be a function of (params, images)")
    inputs, image = _check_image(image)
    if not jax.tree.leaves(params):
        raise InputError(f"params are {kind(params)} and hold no array")
    found = jax.tree.leaves_with_path(params)
    names, leaves = [_name(path) for path, _ in found], tuple(leaf for _, leaf in found)
    _check_names(names, [path for path, _ in found])
    for name, leaf in zip(names, leaves, strict=True):
        _check_array(name, leaf)
    apply = _full_precision(apply)
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
    }
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


def products(program: Program) -> Iterator[tuple[int, Any]]:
    """(leaf, equation) of every leaf that enters a product as it is, laid out anew or scaled.

    A loop that multiplies by a constant, as a recurrent layer does, is such an equation too.
    """
    image = dependents(program, program.x)
    source = {var: number for number, var in enumerate(program.leaves)}
    for eqn in program.eqns:
        atoms = [a for a in eqn.invars if not isinstance(a, core.Literal) and a in source]
        if eqn.primitive.name in PRODUCTS:
            yield from ((source[atom], eqn) for atom in atoms)
        elif scan := scans.read(eqn):
            inside = [eqn.invars[k] for k in range(scan.consts) if _multiplies(scan, k)]
            yield from ((source[atom], eqn) for atom in atoms if atom in inside)
        elif eqn.outvars[0] not in image:
            same = [a for a in atoms if a.aval.size == eqn.outvars[0].aval.size]
            source.update((eqn.outvars[0], source[atom]) for atom in same[:1])


def _multiplies(scan: scans.Scan, constant: int) -> bool:
    return any(eqn.primitive.name in PRODUCTS for eqn in scans.uses(scan, constant))


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


def _check_names(names: list[str], paths: list) -> None:
    """Parts of a path are joined, so that two paths may come out as one name."""
    seen: dict[str, Any] = {}
    for name, path in zip(names, paths, strict=True):
        if name in seen:
            one, other = (jax.tree_util.keystr(p) for p in (seen[name], path))
            raise InputError(f"params{one} and params{other} are both called {name}: rename one")
        if "@" in name:
            raise InputError(f"parameter {name} has an @, which stands before a step: rename it")
        seen[name] = path


def _check_array(name: str, leaf) -> None:
    """Static leaves would fail deep inside, and Python numbers have no words of their own."""
    if not isinstance(leaf, _ARRAYS) or not (is_key(leaf) or _is_numeric(leaf.dtype)):
        raise InputError(
            f"parameter {name} is {kind(leaf)}; params must hold NumPy or JAX arrays of numbers "
            "alone. Make it one, or leave it out of params and close over it in apply"
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
