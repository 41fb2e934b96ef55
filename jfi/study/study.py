"""A study: one network, one workload, as many campaigns as are asked for by name."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jfi.adopt import adopt, batch, pytorch
from jfi.campaign import campaign, records, rounds
from jfi.campaign.campaign import Plan, Progress
from jfi.campaign.rounds import METHODS
from jfi.criteria import names
from jfi.criteria.criterion import Criterion
from jfi.engine.engine import Engine
from jfi.engine.inputs import check_images, check_labels, check_measure
from jfi.errors import InputError, VerificationError, kind
from jfi.faults import Site
from jfi.networks.sites import Network
from jfi.report import tally
from jfi.sampling import estimands, methods
from jfi.sampling.sampling import SAMPLERS, Request
from jfi.study.live import LiveProgress, stoppable
from jfi.study.result import Result, load

# Names of the door whose like below means something else. Of the adaptive samplers, strata by how
# far a bit moves its word need fewest injections of those that ask nothing of the network: no
# gradients (adaptive_score), no radii (adaptive_certified).
PLAIN = {"adaptive": "adaptive_distance", "adaptive_cell": "adaptive"}
ADOPTED = 8  # images on which an adopted network is compared with the model


class Study:
    """A network with its images, on which campaigns are run by name; made by `study`.

    Attributes:
      network: the `jfi` network; images [B, ...]; labels int32 [B], or None where none are given.
      name: of reports and of the default work directory.
      criterion: what makes a fault critical for an image.
    """

    def __init__(
        self,
        network: Network,
        images: np.ndarray,
        labels: np.ndarray | None,
        name: str,
        criterion: Criterion,
    ):
        self.network, self.images, self.labels, self.name = network, images, labels, name
        self.criterion = criterion
        self._made: tuple[tuple[Site, ...], Engine] | None = None

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else "labels"
        return (
            f"Study of {self.name}: {len(self.network.sites)} sites, {len(self.images):,} images, "
            f"{labels}; run() starts a campaign"
        )

    def engine(self, sites: Sequence[Site]) -> Engine:
        """The engine of faults in these sites; the last one made is kept.

        Raises:
          InputError: as of `jfi.Engine`.
        """
        sites = tuple(sites)
        if self._made is None or self._made[0] != sites:
            self._made = None  # its golden values go before others come
            made = Engine(self.network, self.images, self.labels, sites, criterion=self.criterion)
            self._made = sites, made
        return self._made[1]

    def run(
        self,
        sampler: str = "adaptive",
        *,
        error_margin: float = 0.01,
        confidence: float = 0.99,
        workdir: str | PathLike | None = None,
        measure: str | None = None,
        sites: str | None = None,
        fault_model: str = "stuck_at",
        levels: str | Sequence[str] = ("network",),
        estimate: str = "faults",
        seed: int = 0,
        verify: int = 200,
        progress: bool | Callable[[Progress], None] = True,
    ) -> Result:
        """Run a campaign, or go on with it, or find it finished; everything is on record.

        Args:
          sampler: a name of `SAMPLERS` (a sample drawn at once) or of `METHODS` (in rounds, until
            every unit of `levels` has its margin). `adaptive`, the default, is
            `adaptive_distance`: its intervals hold though it stops by what it saw, and of the
            samplers that take neither gradients nor radii of the network it needs fewest
            injections (docs/samplers.md). Strata by layer and bit alone are `adaptive_cell`.
          error_margin, confidence: what the estimates are to hold to.
          workdir: where the record is; by default `runs/<name>_<sampler>`.
          measure: of `jfi.engine.inputs.MEASURES`; by default `critical`: it tells for which
            images a fault is critical, as `full` does, with proofs in place of inference where
            they hold. `full` tells the class of every outcome too, `detect` is quickest and tells
            one image.
          sites: a regular expression of what to break (`jfi.select`); by default the kernels.
          fault_model: a name of `jfi.faults.FAULT_MODELS`.
          levels: units that a sampler in rounds is to bound, of network, layer and bit. Others
            estimate all units.
          estimate: what the margin is of: the share of `faults` critical on at least one image; of
            (fault, image) `pairs` that are critical; or the mean `accuracy` under fault, which
            needs labels. Of the last two `detect` tells neither.
          seed: of the sample: the same faults on any machine.
          verify: random pairs to run again naively at the end.
          progress: True shows it live, False not; a function is called after every shard.

        Raises:
          InputError: one of these is not what it must be, or the work directory holds another
            campaign; before any fault is run.
          VerificationError: a naive run contradicts a verdict; everything is on record by then,
            and `jfi.load` takes it.
          KeyboardInterrupt: Ctrl-C, after the shard in flight; its message says how to go on.
          OSError: a write failed; what was recorded before stays.
        """
        name = _check_sampler(sampler)
        measure = "critical" if measure is None else measure
        check_measure(measure)
        estimands.check(estimate, measure, self.labels is not None)
        _check_verify(verify)
        _check_text("sites", sites, (str,), "a regular expression")
        _check_text("workdir", workdir, (str, PathLike), "the path of a directory")
        levels = (levels,) if isinstance(levels, str) else tuple(levels)
        asked = {
            "sites_pattern": sites,
            "fault_model": fault_model,
            "request": Request(error_margin, confidence),
            "seed": seed,
            "estimate": estimate,
        }
        if name in METHODS:
            plan = rounds.open_plan(self.network, levels=levels, **asked)
        else:
            plan = campaign.plan(self.network, name, **asked)
            methods.units(plan.space, levels)
            levels = None  # it estimates all
        config = {
            "net": self.name,
            "labels": "none" if self.labels is None else "given",
            "sampler": name,
            "measure": measure,
            "criterion": self.criterion.text,
            "estimate": estimate,
            "fault_model": fault_model,
            "sites": sites,
            "error_margin": float(error_margin),
            "confidence": float(confidence),
            "seed": int(seed),
            "levels": levels,
        }
        path = Path("runs", _folder(f"{self.name}_{sampler}")) if workdir is None else Path(workdir)
        with ExitStack() as stack:
            shown = _shown(progress, stack)
            heard = stack.enter_context(stoppable(shown, _go_on(path)))
            options = {"measure": measure, "verify_pairs": verify, "progress": heard}
            self._record(plan, path, config, options)
        return load(path)

    def _record(self, plan: Plan, path: Path, config: dict[str, Any], options: dict) -> None:
        """Run the campaign of these flags, and write what was measured into its summary.

        Raises:
          VerificationError: once that is written.
        """
        engine, name = self.engine(plan.space.sites), config["sampler"]
        run = partial(campaign.run, plan)
        if name in METHODS:
            run = partial(
                rounds.run, name, plan.space, request=plan.request, levels=config["levels"],
                seed=plan.seed, estimate=plan.estimate,
            )  # fmt: skip
        earlier, wrong = _earlier(path), None
        try:
            found = run(
                engine=engine, workdir=path, config=config,
                keep_bits=config["measure"] != "detect", **options,
            )  # fmt: skip
        except VerificationError as error:
            found, wrong = error.summary, error
        measured = {**earlier, **_measured(found, engine, self.labels is not None)}
        pairs = dict(found["pairs"])
        if self.labels is None:  # nothing is correct or not
            pairs.pop("correct", None)
        worst = tally.worst(path, self.network)
        own = {"pairs": pairs, "measured": measured, "worst": worst}
        records.write_summary(path, {**found, **own})
        if wrong is not None:
            raise wrong


def study(
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    criterion: Criterion | str | None = None,
    output: str | None = None,
    name: str | None = None,
    dt: float = 1e-4,
) -> Study:
    """The front door: `jfi.study(model, images, labels).run("adaptive", error_margin=0.01)`.

    Args:
      model: anything `jfi.adopt` takes (PyTorch, Keras, Flax, Equinox, Haiku, ONNX, NIR, or
        `(apply, params)`), or a network of `jfi.network`.
      images: [B, ...] as the model takes them: NumPy, JAX or PyTorch; or a dict or tuple of such
        arrays.
      labels: as the criterion takes them, of top1 int [B], in [0, C). A fault is critical when the
        answer differs from the golden one, whatever the label: without labels only accuracies are
        left out.
      criterion: what makes a fault critical for an image (`jfi.criteria`), or its name, as
        `top_k:5`; by default that the top-1 of scores [B, C] changes.
      output: the name of the one array to judge faults by, where the model returns several
        (`jfi.network`).
      name: what the study is called; by default the model's class, function or file.
      dt: the time step of a NIR graph (`jfi.adopt`).

    Raises:
      InputError: as of `jfi.adopt`; images or labels that are no such arrays.
    """
    images = batch(images, "images are")
    asked = names.check(criterion)
    if isinstance(model, Network):
        if output is not None:
            raise InputError(f"output {output!r}: a network has its own; say it to jfi.network")
        network = model
    else:
        few = jax.tree.map(lambda x: x[:ADOPTED], images)
        network = adopt(model, few, dt=dt, output=output)
    images = check_images(network, images)
    if labels is not None:
        labels = pytorch.array(labels) if hasattr(labels, "detach") else labels
    asked = asked or names.usual(network.outputs, labels)
    by = asked.judge(network.outputs)
    if labels is not None:
        labels = check_labels(labels, len(images), by, asked.text)
    name = _name(model) if name is None else _check_called(name)
    return Study(network, images, labels, name, asked)


def _check_sampler(sampler: str) -> str:
    """The name, below the door, of a sampler."""
    known = dict.fromkeys((*PLAIN, *METHODS, *SAMPLERS))
    campaign.check_name("sampler", sampler, known)
    return PLAIN.get(sampler, sampler)


def _check_verify(verify: int) -> None:
    if not isinstance(verify, int | np.integer) or verify < 0:
        raise InputError(f"verify is {kind(verify)}; it must be how many pairs to run again, 0 on")


def _check_text(called: str, value: Any, of: tuple[type, ...], wanted: str) -> None:
    if value is not None and not isinstance(value, of):
        raise InputError(f"{called} is {kind(value)}; it must be {wanted}, or None")


def _check_called(name: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"name is {kind(name)}; it must be a text to call the study by")
    return name


def _name(model: Any) -> str:
    """What a model is called: its file, its function or its class."""
    if isinstance(model, str | PathLike):
        return Path(fspath(model)).stem
    if isinstance(model, Network):
        return "network"
    first = model[0] if type(model) is tuple else model
    owner = getattr(first, "__self__", None)  # of a method, as `module.apply`
    named = getattr(first, "__name__", None) if owner is None else None
    if named is None:
        return type(first if owner is None else owner).__name__
    return "network" if named in ("<lambda>", "apply") else named


def _folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _shown(progress: bool | Callable, stack: ExitStack) -> Callable[[Progress], None]:
    """What is called after every shard."""
    if progress is True:
        return stack.enter_context(LiveProgress())
    if progress is False or progress is None:
        return lambda state: None
    if not callable(progress):
        raise InputError(f"progress is {kind(progress)}; it must be True, False or a function")
    return progress


def _go_on(path: Path) -> str:
    return (
        f"stopped; what was done is on record in {path}, and the same run() goes on from there "
        "(with the same model, images, labels and options)"
    )


def _earlier(path: Path) -> dict:
    """What the run that finished this campaign before measured; empty where none did."""
    try:
        return records.read_summary(path).get("measured", {})
    except InputError:
        return {}


def _measured(found: dict[str, Any], engine: Engine, labelled: bool) -> dict[str, Any]:
    """What this run measured; the rate only where it ran any fault itself."""
    measured = {"images": found["images"]}
    if labelled:
        measured["golden_accuracy"] = engine.accuracy
    if found["run"]["faults"]:
        measured["seconds"] = round(found["run"]["seconds"], 1)
        measured["verdicts_per_second"] = round(found["run"]["verdicts_per_second"])
    return measured
