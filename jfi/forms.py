"""What a network takes and returns, beside one array: trees of arrays, and the one row they lie in.

The engine computes with one array of inputs [B, ...] and one row of outputs [B, N]. A network that
takes several arrays gets them out of one row of bytes, and what it returns is written into one row
of floats, without a bit lost either way.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfi.errors import InputError, kind

SMALL = 2  # bytes of integers that float32 holds exactly
HALF = 1 << 16  # larger ones are two floats: what is above, and what is below


class Inputs(NamedTuple):
    """A tree of arrays for one image, and how they lie in its bytes.

    shapes, dtypes: of the leaves, without the batch axis, in the order of the tree.
    """

    tree: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]

    @property
    def size(self) -> int:
        """Bytes of one image."""
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        each = zip(self.shapes, self.dtypes, strict=True)
        return [int(np.prod(shape)) * dtype.itemsize for shape, dtype in each]

    def pack(self, images: Any) -> np.ndarray:
        """uint8 [B, size] of a tree of arrays [B, ...].

        Raises:
          InputError: another tree, shape or dtype; no image, or not as many in each array.
        """
        leaves, tree = jax.tree.flatten(images)
        if tree != self.tree:
            raise InputError(f"images are {tree}; the network takes {self.tree}")
        leaves = [np.asarray(leaf) for leaf in leaves]
        leaves = [x.astype(jax.dtypes.canonicalize_dtype(x.dtype)) for x in leaves]
        count = len(leaves[0]) if leaves[0].ndim else 0
        for name, leaf, shape, dtype in zip(
            self.names, leaves, self.shapes, self.dtypes, strict=True
        ):
            if leaf.shape != (count, *shape) or leaf.dtype != dtype or not count:
                raise InputError(
                    f"images: {name} has shape {leaf.shape} and dtype {leaf.dtype}; the network "
                    f"takes [B, {', '.join(map(str, shape))}] of {dtype}, as many in each array"
                )
        rows = [np.ascontiguousarray(x).reshape(count, -1).view(np.uint8) for x in leaves]
        return np.concatenate(rows, axis=1)

    def unpack(self, rows: Any) -> Any:
        """The tree of arrays [B, ...] of bytes uint8 [B, size], under jit too."""
        ends = np.cumsum(self._sizes())[:-1]
        parts = jnp.split(rows, ends, axis=1)
        leaves = [_words(*one) for one in zip(parts, self.shapes, self.dtypes, strict=True)]
        return jax.tree.unflatten(self.tree, leaves)


def _words(part, shape: tuple[int, ...], dtype: np.dtype):
    """Bytes [B, n] as an array [B, *shape]."""
    if dtype.kind == "b":
        return (part != 0).reshape(-1, *shape)
    size = dtype.itemsize
    groups = part.reshape(len(part), -1, size) if size > 1 else part
    return jax.lax.bitcast_convert_type(groups, dtype).reshape(-1, *shape)


def inputs(image: Any) -> Inputs:
    """The form of one image, a tree of arrays (or of `jax.ShapeDtypeStruct`).

    Raises:
      InputError: a leaf that is no array of numbers.
    """
    found, tree = jax.tree.flatten_with_path(image)
    names = tuple(path_name(path) for path, _ in found)
    for name, (_, leaf) in zip(names, found, strict=True):
        if not hasattr(leaf, "shape") or not _is_numeric(leaf.dtype):
            raise InputError(f"image: {name} is {kind(leaf)}; it must be an array of numbers")
    dtypes = (np.dtype(jax.dtypes.canonicalize_dtype(leaf.dtype)) for _, leaf in found)
    return Inputs(tree, names, tuple(tuple(leaf.shape) for _, leaf in found), tuple(dtypes))


def _is_numeric(dtype) -> bool:
    return jnp.issubdtype(dtype, np.number) or dtype == np.dtype(bool)


def path_name(path: Sequence[Any]) -> str:
    """`boxes` or `heads/0` of the place of a leaf in a tree; `it` of one leaf alone."""
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return "/".join(map(str, keys)) or "it"


class Output(NamedTuple):
    """One array that a network returns for one image, without the batch axis."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape))

    @property
    def is_wide(self) -> bool:
        """Whether it has integers that no float32 holds."""
        return self.dtype.kind in "iu" and self.dtype.itemsize > SMALL

    @property
    def columns(self) -> int:
        """Columns of the row that it takes."""
        return self.size * (1 + self.is_wide)


class Outputs(NamedTuple):
    """The arrays that a network returns for one image, and the row [N] they lie in.

    dtype: of the row, the widest of the floats, at least float32 beside integers.
    link: what the network itself ends in: `softmax` or `log_softmax` over the last axis, `sigmoid`,
      or empty for none that is known.
    """

    tree: Any
    arrays: tuple[Output, ...]
    dtype: np.dtype
    link: str = ""

    @property
    def size(self) -> int:
        """Columns of the row."""
        return sum(array.columns for array in self.arrays)

    @property
    def is_plain(self) -> bool:
        """Whether the row is the one array, as it is."""
        return len(self.arrays) == 1 and self.arrays[0].dtype == self.dtype

    @property
    def is_scores(self) -> bool:
        """Whether they are one array of floats, whose last axis may be of classes."""
        return self.is_plain and len(self.arrays[0].shape) > 0

    @property
    def starts(self) -> list[int]:
        """The first column of each array."""
        return [0, *np.cumsum([array.columns for array in self.arrays])[:-1].tolist()]

    def told(self, columns: np.ndarray) -> str:
        """Which of several arrays the first of these columns, bool [N], is of, in words."""
        if len(self.arrays) == 1:
            return ""
        number = int(np.searchsorted(self.starts, np.flatnonzero(columns)[0], "right")) - 1
        return f" {self.arrays[number].name}"

    def row(self, found: Any) -> Any:
        """[B, N] of what the network returned, a tree of arrays [B, ...]."""
        leaves = [x if x.ndim == 2 else _flat(x) for x in jax.tree.leaves(found)]
        if self.is_plain:
            return leaves[0]
        parts = []
        for array, leaf in zip(self.arrays, leaves, strict=True):
            if array.is_wide:
                parts += [(leaf // HALF).astype(self.dtype), (leaf % HALF).astype(self.dtype)]
            else:
                parts.append(leaf.astype(self.dtype))
        return jnp.concatenate(parts, axis=1)

    def of_row(self, row: Any) -> Any:
        """The tree of arrays of one image of its row [N]."""
        return jax.tree.unflatten(self.tree, [self.array(k, row) for k in range(len(self.arrays))])

    def array(self, number: int, row: Any) -> Any:
        """One of the arrays of one image, of its row [N]."""
        own, start = self.arrays[number], self.starts[number]
        part = row[start : start + own.columns]
        if own.is_wide:
            high, low = (x.astype(own.dtype) for x in jnp.split(part, 2))
            part = high * np.asarray(HALF, own.dtype) + low
        elif own.dtype.kind == "b":
            part = part != 0
        return part.astype(own.dtype).reshape(own.shape)


def _flat(x):
    return x.reshape(x.shape[0], -1)


def plain(found: Any) -> Any:
    """What a network returned, with classes of libraries (dataclasses, kinds of dict) as dicts;
    None is nothing."""
    if isinstance(found, Mapping):
        return {str(key): plain(value) for key, value in found.items() if value is not None}
    if dataclasses.is_dataclass(found) and not hasattr(found, "shape"):
        return plain({f.name: getattr(found, f.name) for f in dataclasses.fields(found)})
    if isinstance(found, tuple | list):
        values = [plain(value) for value in found]
        return type(found)(*values) if hasattr(found, "_fields") else type(found)(values)
    return found


def chosen(found: Any, name: str) -> Any:
    """The one array of that name, of the tree that a network returned.

    Raises:
      InputError: there is none.
    """
    named = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(found)}
    if name not in named:
        raise InputError(f"output {name!r} is none of what the network returns: {', '.join(named)}")
    return named[name]


def outputs(found: Any) -> Outputs:
    """The form of what a network returned for one image: a tree of arrays [1, ...].

    Raises:
      InputError: nothing; what is no array of real numbers with a batch axis of one.
    """
    leaves, tree = jax.tree.flatten_with_path(found)
    if not leaves:
        raise InputError(f"the network returns {kind(found)}; it must return an array, or several")
    arrays = []
    for path, leaf in leaves:
        name = path_name(path)
        form = f"the network returns {kind(leaf)}" + (f" as {name}" if path else "")
        if not hasattr(leaf, "shape") or jnp.issubdtype(leaf.dtype, np.complexfloating):
            raise InputError(f"{form}; it must be an array of real numbers")
        if not _is_numeric(leaf.dtype):
            raise InputError(f"{form}; it must be an array of real numbers")
        if not leaf.ndim or leaf.shape[0] != 1:
            raise InputError(
                f"{form} for one image; the first axis must be that of images, [1, ...]"
            )
        if leaf.dtype.itemsize > 4 and leaf.dtype.kind in "iu":
            raise InputError(f"{form}; integers of 64 bits can't be kept beside floats: cast them")
        arrays.append(Output(name, tuple(leaf.shape[1:]), np.dtype(leaf.dtype)))
    floats = [array.dtype for array in arrays if jnp.issubdtype(array.dtype, np.floating)]
    if len(floats) < len(arrays):
        floats.append(np.dtype(np.float32))
    dtype = np.dtype(jnp.result_type(*floats) if len(set(floats)) > 1 else floats[0])
    return Outputs(tree, tuple(arrays), dtype)
