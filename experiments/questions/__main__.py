"""Every criterion on a small network of its own: what a fault may do to more than a top-1 answer.

    python -m experiments.questions

trains five networks in seconds each (a single-shot detector, a segmenter, a multi-label tagger, a
regressor, a character GPT: `experiments.questions.networks`), tells how good each is on what it was
not trained on, and runs a campaign of each with its criterion, and of LeNet on digits with three:
the measure `critical` by the adaptive sampler, until the error margin is reached. Random verdicts
are run again naively. Printed, and written to OUT/questions.md, is one table:

    network, quality, criterion, share of critical faults (with the 99% interval), share of pairs
    that a certificate decided, of those that were not known by the word alone, injections, seconds
    of the campaign

The engine makes certificates where that is estimated to pay, and campaigns as short as these run
their few faults sooner. --provable=500 tries them on so many random pairs, whether it pays or not,
and tells the share that they decide: half a minute a row.

Weights, and test data as `python -m experiments.campaign` takes them, are in OUT too. Networks that
are trained already, and campaigns that are done, are not done again.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import jfi
import nets
from experiments import cli, target
from experiments.data import sets
from experiments.questions import data, networks, training
from jfi.errors import VerificationError
from jfi.faults import FAULT_MODELS, take

HEADER = (
    "network", "quality", "criterion", "critical", "certified", "provable", "injections", "seconds"
)  # fmt: skip
# What is asked of each network.
ASKED = {
    "detector": ("detections:boxes=cxcywh",),
    "segmenter": ("pixels", "pixels:0.01"),
    "tagger": ("threshold",),
    "regressor": ("tolerance:10",),
    "gpt": ("tokens:any", "tokens:last"),
    "lenet": ("top1", "top_k:3", "accuracy_drop:5"),
}


class Subject(NamedTuple):
    """A network that is asked about; model as `jfi.study` takes it."""

    name: str
    model: Any
    images: np.ndarray
    labels: np.ndarray | None
    quality: str


def define_flags() -> None:
    """Flags of this script."""
    flags.DEFINE_list("nets", list(ASKED), f"Which of {', '.join(ASKED)}.")
    flags.DEFINE_float("effort", 1.0, "Steps of training, times the usual.", 0)
    flags.DEFINE_integer("images", data.TEST, "Test images at most.", 1)
    flags.DEFINE_float("error_margin", 0.01, "Error margin e wanted, in (0, 1).")
    flags.DEFINE_integer(
        "provable", 0, "Random pairs of each network that certificates are tried on; 0: none.", 0
    )
    flags.DEFINE_integer("verify", 200, "Pairs of each campaign to run again naively.", 0)
    flags.DEFINE_string(
        "out",
        str(networks.FOLDER),
        "Folder for weights, data, records and the table. The functions of "
        "experiments/questions/networks.py read the usual one.",
    )


def main() -> int | None:
    """Train, ask, and print the table."""
    args = flags.FLAGS
    for name in args.nets:
        if name not in ASKED:
            raise jfi.InputError(f"nets {name!r} is unknown; choose from {', '.join(ASKED)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows, wrong = [HEADER], ""
    for subject in subjects(args.nets, out):
        print(f"{subject.name}: {subject.quality}, {len(subject.images)} images", flush=True)
        for criterion in ASKED[subject.name]:
            row, failed = ask(subject, criterion, out)
            print(", ".join(row[2:]), flush=True)
            rows.append(row)
            wrong = wrong or failed
    text = table(rows)
    (out / "questions.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {out / 'questions.md'}")
    return cli.fail(f"verification failed: {wrong}") if wrong else None


def subjects(wanted: list[str], out: Path) -> Iterator[Subject]:
    """The networks, trained."""
    for name in wanted:
        yield lenet() if name == "lenet" else small(name, out)


def small(name: str, out: Path) -> Subject:
    """One of `networks`, its weights and test data in the folder."""
    args, lesson = flags.FLAGS, training.LESSONS[name]()
    if not (out / f"{name}_weights.npz").is_file():
        steps = max(1, round(lesson.steps * args.effort))
        started = time.perf_counter()
        variables = jax.block_until_ready(training.fit(name, lesson, steps))
        print(f"{name}: {steps} steps in {time.perf_counter() - started:.0f} s", flush=True)
        networks.save(out / f"{name}_weights.npz", variables)
    labelled = {} if lesson.y_test is None else {"y_test": lesson.y_test}
    sets.write_npz(out / f"{name}.npz", {"x_test": lesson.x_test, **labelled})
    module, variables = networks.trained(name, out)
    quality = lesson.quality(training.outputs(name, variables, lesson.x_test))
    some = slice(args.images)
    labels = None if lesson.y_test is None else lesson.y_test[some]
    return Subject(name, (module, variables), lesson.x_test[some], labels, quality)


def lenet() -> Subject:
    """LeNet on digits, with the weights that come with the project."""
    dataset = sets.load("digits", train=False)
    net = nets.build("lenet", dataset.x_test.shape[1:])
    network = target.load_network(net, target.KEPT / "lenet_digits.safetensors")
    images, labels = target.workload(net, dataset, None)
    found = np.asarray(jax.jit(network.apply)(network.params, images)).argmax(1)
    some = slice(flags.FLAGS.images)
    quality = f"{(found == labels).mean():.1%} of digits"
    return Subject("lenet", network, images[some], labels[some], quality)


def ask(subject: Subject, criterion: str, out: Path) -> tuple[tuple[str, ...], str]:
    """A row of the table by a campaign, and what its verification found wrong."""
    args, wrong = flags.FLAGS, ""
    study = jfi.study(
        subject.model, subject.images, subject.labels, criterion=criterion, name=subject.name
    )
    workdir = out / f"{subject.name}_{criterion.replace(':', '_')}"
    options = {"error_margin": args.error_margin, "verify": args.verify, "progress": False}
    try:
        summary = study.run("adaptive", workdir=workdir, **options).summary
    except VerificationError as error:
        summary, wrong = error.summary, f"{subject.name}, {criterion}: {error}"
    return told(subject, criterion, summary, provable(study, args.provable)), wrong


def provable(study, pairs: int) -> str:
    """What share of random pairs of faults and images certificates decide, if they are tried."""
    if not pairs or study.criterion.judge(study.network.outputs).constraints is None:
        return "–"
    sites = jfi.select(study.network)
    engine = jfi.Engine(
        study.network, study.images, study.labels, sites, criterion=study.criterion, loop=False
    )
    space, rng = jfi.FaultSpace(sites, FAULT_MODELS["stuck_at"]), np.random.default_rng(0)
    faults = space.decode(rng.integers(0, space.size, 4 * pairs))
    some = np.flatnonzero(~engine.identity(faults))[:pairs]
    image = rng.integers(0, len(engine.images), some.size)
    return f"{engine.critical_pairs(take(faults, some), image)[1].mean():.0%}"


def told(
    subject: Subject, criterion: str, summary: Mapping[str, Any], proven: str
) -> tuple[str, ...]:
    """A row of the table, by the summary of a campaign."""
    network, decided = summary["estimates"][0], summary["decided"]
    asked = decided["certificate"] + decided["inference"]
    return (
        subject.name,
        subject.quality,
        f"`{criterion}`",
        f"{network['estimate']:.2%} ({network['low']:.2%} to {network['high']:.2%})",
        f"{decided['certificate'] / max(1, asked):.0%}",
        proven,
        f"{network['injections']:,}",
        f"{summary['measured']['seconds']:.0f}",
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as Markdown."""
    rule = ("---",) * len(HEADER)
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
