"""Networks that users bring: a function in a Python file, or a model in a file.

`--net=my_model.py:build` names a function that is called without arguments (`build` may be left
out) and returns anything `jfi.adopt` takes, or a pair `(that, preprocess)`. The rule that tells
them apart: a pair whose second value can be called is `(model, preprocess)`; `(apply, params)`,
`(module, variables)` and the like are no such pairs, as their second value holds arrays. (Of
parameters that can be called, as an Equinox module, return `((apply, params), lambda x: x)`.)
`preprocess` takes images as the data set has them, NumPy [B, ...], and returns what the network
takes, one array [B, ...].

`--net=FILE.onnx` and `--net=FILE.nir` are adopted as they are. A path that `build` returns is
meant from the folder of its file.

The network gets the images exactly as the .npz file holds them, whatever their rank and type: no
scaling, no axis moved. Those of a data set known by name are floats in [0, 1], [B, H, W, C].
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

import jfi
import nets
from jfi.adopt import batch
from jfi.criteria.criterion import Criterion
from jfi.criteria.criterion import own as own_criterion
from jfi.engine.inputs import check_images
from jfi.errors import InputError, kind
from jfi.networks.sites import Network

MODELS = (".onnx", ".nir")
FORMS = "FILE.py:FUNCTION, FILE.onnx or FILE.nir"
USUAL = "build"
ADOPTED = 8  # images on which an adopted network is compared with the model
# Packages of ours whose names a user's folder may have too.
OURS = ("experiments", "nets")
# What a framework that is not installed is installed as.
EXTRAS = {
    "torch": "torch", "torchax": "torch", "keras": "keras", "equinox": "equinox",
    "haiku": "haiku", "onnx": "onnx", "nir": "nir",
}  # fmt: skip
_SOURCE = re.compile(r"(?P<file>.+\.py)(:(?P<function>.*))?")


class Own(NamedTuple):
    """A network of a user, not yet adopted.

    name: in names of files and in words. shown: the file's name, and the function's.
    path: of the file, absolute. given: what `--net` names it by, from any folder.
    sha256: of the file's bytes.
    model: as `jfi.adopt` takes it. preprocess: images of the data set to the network's input.
    """

    name: str
    shown: str
    path: Path
    given: str
    sha256: str
    model: Any
    preprocess: Callable[[np.ndarray], Any] | None

    @property
    def config(self) -> dict[str, str]:
        """What a record keeps of it."""
        return {"net": self.shown, "net_path": self.given, "net_sha256": self.sha256}


def is_own(net: str) -> bool:
    """Whether `--net` names a file, not a network of the project."""
    return bool(_SOURCE.fullmatch(net)) or Path(net).suffix.lower() in MODELS


def load(net: str) -> Own:
    """The network of a file.

    Args:
      net: one of `FORMS`; a path from the current folder.

    Raises:
      InputError: no such file or function; what the file, or the function, raises; a file of
        another kind.
    """
    source = _SOURCE.fullmatch(net)
    path = Path(os.path.abspath(Path(source["file"] if source else net).expanduser()))
    if not path.is_file():
        raise InputError(f"net {net}: there is no file {path}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if source is None:
        return Own(path.stem, path.name, path, str(path), sha256, str(path), None)
    function = source["function"] or USUAL
    os.environ.setdefault("KERAS_BACKEND", "jax")  # what jfi adopts Keras models on
    with _at_home(path.parent):
        built = _call(_function(_module(path, net), function, net), f"net {net}: {function}()")
    model, preprocess = parted(built)
    if isinstance(model, str | os.PathLike):
        model = str(path.parent / model)
    name = path.stem if function == USUAL else f"{path.stem}_{function}"
    end = f":{function}"
    return Own(name, path.name + end, path, str(path) + end, sha256, model, preprocess)


def parted(built: Any) -> tuple[Any, Callable | None]:
    """(model, preprocess) of what a function returned; None where there is no preprocessing."""
    if type(built) is tuple and len(built) == 2 and callable(built[1]):
        return built
    return built, None


def is_python(text: str) -> bool:
    """Whether a flag names a function of a Python file."""
    return bool(_SOURCE.fullmatch(text))


def criterion(text: str) -> Criterion:
    """The criterion of FILE.py:FUNCTION: a function of (golden, faulty), or a `Criterion`.

    Its text is the file's name, the function's and the first letters of the file's hash.

    Raises:
      InputError: no such file or function, or what the file raises.
    """
    source, what = _SOURCE.fullmatch(text), f"criterion {text}"
    path = Path(os.path.abspath(Path(source["file"]).expanduser()))
    if not path.is_file():
        raise InputError(f"{what}: there is no file {path}")
    if not source["function"]:
        raise InputError(f"{what}: name the function, as {path.name}:FUNCTION")
    with _at_home(path.parent):
        found = _module(path, text, "criterion")
    found = getattr(found, source["function"], None)
    if not isinstance(found, Criterion):
        if not callable(found):
            raise InputError(f"{what}: {path.name} has no function {source['function']}")
        found = own_criterion(found)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return found._replace(text=f"{path.name}:{source['function']} ({sha256[:12]})")


def adopt(
    own: Own,
    x: np.ndarray,
    dt: float | None = None,
    activations: bool = False,
    output: str | None = None,
) -> tuple[Network, np.ndarray]:
    """The network, and the images [B, ...] as it takes them, several arrays as their bytes.

    Args:
      x: images of the data set, as it has them.
      dt: time step of a NIR graph, in seconds.
      activations: make the outputs of layers sites, where the framework is one that tells layers.
      output: the name of the array to judge faults by, of several.

    Raises:
      InputError: as of `jfi.adopt`; preprocessing that raises, or returns no such array; no layer
        to make a site of.
    """
    images = preprocessed(own, x)
    options: dict[str, Any] = {} if dt is None else {"dt": dt}
    options |= {} if output is None else {"output": output}
    try:
        network = jfi.adopt(own.model, _first(images, ADOPTED), **options)
    except InputError as error:
        advice = _advice(own, images, options)
        raise InputError(f"net {own.shown}: {str(error).rstrip('.')}{advice}") from error
    except Exception as error:  # of a function of the user's own, (apply, params)
        told = f"on images {kind(images)} it raised {_told(error)}"
        advice = _advice(own, images, options)
        raise InputError(f"net {own.shown}: {told.rstrip('.')}{advice}") from error
    images = check_images(network, images)
    return (_with_outputs(network, own, images[0]) if activations else network), images


def _first(images: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x[:count], images)


def _with_outputs(network: Network, own: Own, image: np.ndarray) -> Network:
    """The network with the output of every Flax Linen layer named: `conv1/output`."""

    def apply(params, x):
        with nets.named_outputs():
            return network.apply(params, x)

    named = jfi.network(apply, network.params, image)
    if len(named.taps) == len(network.taps):
        raise InputError(
            f"net {own.shown}: only layers of Flax Linen are told by --activations; elsewhere name "
            "values with jax.ad_checkpoint.checkpoint_name, which makes them sites without it"
        )
    return named._replace(
        left_out={**named.left_out, **network.left_out}, inputs=network.inputs,
        outputs=network.outputs._replace(link=named.outputs.link),
    )  # fmt: skip


def preprocessed(own: Own, x: np.ndarray) -> Any:
    """The images as the network takes them, NumPy [B, ...], or a tree of such arrays."""
    if own.preprocess is None:
        return batch(x, f"net {own.shown}: images are")
    what = f"net {own.shown}: preprocess (the second value of the pair) on {kind(x)}"
    images = batch(_call(lambda: own.preprocess(x), what), f"{what} returns")
    if len(jax.tree.leaves(images)[0]) != len(x):
        raise InputError(f"{what} returns {kind(images)}; it must be as many images, {len(x)}")
    return images


def _advice(own: Own, images: Any, options: dict[str, Any]) -> str:
    """In which other layout or type the network takes the images, where it does."""
    if not isinstance(images, np.ndarray):
        return ""
    for code, change in _layouts(images):
        with contextlib.suppress(Exception):
            jfi.adopt(own.model, change(images[:ADOPTED]), **options)
            pair = f"{own.path.name!r}" if own.path.suffix.lower() in MODELS else "model"
            return (
                f". It does run on {code} of these images x: let the function of a FILE.py return "
                f"({pair}, lambda x: {code})"
            )
    return ""


def _layouts(images: np.ndarray) -> Iterator[tuple[str, Callable]]:
    """Other layouts and types that images are often wanted in: code of x, and what it does."""
    moved: list[tuple[str, Callable]] = [("x", lambda x: x)]
    if images.ndim == 4:
        moved += [
            ("x.transpose(0, 3, 1, 2)", lambda x: x.transpose(0, 3, 1, 2)),
            ("x.transpose(0, 2, 3, 1)", lambda x: x.transpose(0, 2, 3, 1)),
        ]
    if images.ndim == 3:
        moved += [("x[:, None]", lambda x: x[:, None]), ("x[..., None]", lambda x: x[..., None])]
    yield from moved[1:]
    if images.dtype == np.uint8:
        for code, move in moved:
            yield (
                f"{code}.astype('float32') / 255",
                lambda x, move=move: move(x).astype(np.float32) / np.float32(255),
            )


# --- The user's file


def _module(path: Path, net: str, flag: str = "net") -> ModuleType:
    """The module of a file, run under a name that no other module has."""
    name = f"_own_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    _call(lambda: spec.loader.exec_module(module), f"{flag} {net}: the file")
    return module


def _function(module: ModuleType, name: str, net: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    own = [
        key for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
        and not key.startswith("_")
    ]  # fmt: skip
    there = f"it has {', '.join(own)}" if own else "it has no function"
    what = "no" if found is None else f"{kind(found)}, no function, as"
    raise InputError(f"net {net}: {Path(module.__file__).name} has {what} {name}; {there}")


def _call(function: Callable[[], Any], what: str) -> Any:
    """What a function of the user's returns; what it raises, in one line with file and line."""
    try:
        # Standard output is the script's: with --json a program may read it.
        with contextlib.redirect_stdout(sys.stderr):
            return function()
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} raised {_told(error)}") from error


def _told(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    told = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{told} ({error.filename}:{error.lineno})" if error.filename else told
    # The innermost frame that is the user's, not of a library or of these scripts.
    installed = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    ours = (str(Path(module.__file__).parent) for module in (jfi, sys.modules[__name__]))
    apart = (*installed, *ours, "<frozen")
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if not frame[0].startswith(apart)]
    if own:
        told += f" ({own[-1][0]}:{own[-1][1]})"
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        told += f"; install it: pip install 'jfi[{EXTRAS[error.name]}]'"
    return told


@contextlib.contextmanager
def _at_home(folder: Path) -> Iterator[None]:
    """The user's folder first on the path, as when the file is run; then last, for imports in
    functions. Modules of ours stand back for siblings of their names, and come back."""
    theirs = [name for name in OURS if _is_sibling(folder, name)]
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in theirs}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in theirs]:
            del sys.modules[name]
        sys.modules.update(ours)


def _is_sibling(folder: Path, name: str) -> bool:
    """Whether a folder has a module of that name that is not ours."""
    ours = Path(__file__).parents[1]
    there = (folder / f"{name}.py").is_file() or (folder / name).is_dir()
    return there and folder.resolve() != ours.resolve()
