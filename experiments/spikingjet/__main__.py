"""Reproduce SpikingJET's tables and figure: faults in all six places of a spiking network.

    python -m experiments.spikingjet --net=snn_nmnist --weights=NMNIST.th --dataset=nmnist.npz

(A. B. Gogebakan, E. Magliano, A. Carpegna et al., "SpikingJET: Enhancing Fault Injection for Fully
and Convolutional Spiking Neural Networks", IEEE European Test Symposium 2024). Faults are drawn
from weights, biases, beta, threshold (and alpha), membrane potential and output spike of every
layer together, by the paper's sample size (e = 1%, t = 2.58 for 99%), and are stuck-at for real:
of run-time values at every time step. --fault_model=flip injects what the released tool does.

Printed, and written to --out:

    Table II    faults injected, and the time it took, beside the paper's
    Table III   by layer and parameter: faults injected, n% of all, and the share of pairs (fault,
                sample) by outcome: SDC-1, SDC 0-5%, 5-10%, 10-20%, above 20%, masked, non-finite
    Figure 2    outcomes of every network run so far into --out, stacked

100 samples of N-MNIST take 15 s on one core of a Xeon (the paper: 5 hours on a GPU for its whole
test set). By its number of faults the paper's N-MNIST campaign was of the released network, with 20
hidden neurons and not 500, and of one fault a bit: 11,910 words of 32 bits ask for 15,944.8 faults,
the paper has 15,944; and so for DVS128, 16,307.7 and 16,307. --fault_model=flip draws those.

A run that was stopped goes on when started again with the same flags.
"""

import json
from pathlib import Path

from absl import flags

import jfi
import nets
from experiments import campaign as campaign_script
from experiments import cli, target
from experiments.papers import figures
from experiments.spikingjet.reproduction import (
    CONFIG,
    PUBLISHED,
    TITLES,
    keep,
    rows,
    table_2,
    table_3,
)
from jfi.engine.engine import Engine
from jfi.faults import FAULT_MODELS
from jfi.sampling.sampling import SAMPLERS, check


def define_flags() -> None:
    """Flags of this script."""
    target.define_network("snn_nmnist")
    target.define_workload("nmnist")
    flags.DEFINE_enum("sampler", "network_wise", list(SAMPLERS), "As of experiments.campaign.")
    flags.DEFINE_enum("fault_model", "stuck_at", list(FAULT_MODELS), "Which faults.")
    flags.DEFINE_string("sites", ".*", "Where: a regular expression of whole names.")
    target.define_request(t=2.58)
    flags.DEFINE_integer("seed", 0, "Seed of the sample.", 0)
    flags.DEFINE_integer("verify", 1000, "Random pairs to run again naively at the end.", 0)
    flags.DEFINE_string("out", "runs/spikingjet", "Folder for records, tables and the figure.")


def main() -> int | None:
    """Run the network that the flags name, and print the tables."""
    args = flags.FLAGS
    dataset = target.dataset()
    net = nets.build(args.net, dataset.x_test.shape[1:])
    weights = target.weights_path(net, dataset.name)
    net = target.normalising(net, weights)
    samples, labels = target.workload(net, dataset, args.images)
    network = target.load_network(net, weights)
    options = {"sites_pattern": args.sites, "fault_model": args.fault_model, "seed": args.seed}
    plan = jfi.plan(network, args.sampler, request=check(target.request()), **options)
    engine = Engine(network, samples, labels, plan.space.sites)
    name, out = f"{net.name}_{dataset.name}_{args.fault_model}", Path(args.out)
    config = {flag: getattr(args, flag) for flag in CONFIG} | target.recorded(net)
    with campaign_script.LiveProgress() as progress:
        summary = campaign_script.despite_wrong(
            jfi.run, plan, engine, out / name, config, verify_pairs=args.verify, progress=progress
        )
    found = rows(
        out / name, [s.name for s in plan.space.sites], plan.space.site_sizes, len(samples)
    )
    keep(out / f"{name}.json", net.name, found, len(samples), summary)
    kept = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    shares = {one: dict(zip(TITLES, of["shares"], strict=True)) for one, of in kept.items()}
    figures.stacked(out / "figure2.png", shares)
    accuracy = engine.accuracy
    verify = summary["verify"]
    parts = [
        f"# {net.name}: golden accuracy {accuracy:.2%} of {len(samples):,} samples",
        f"## Table II\n\n{table_2(kept)}",
        f"## Table III\n\n{table_3(found, PUBLISHED.get(net.name, {}))}",
        f"Of {verify['pairs']:,} pairs run again naively {verify['agreements']:,} agree, "
        f"{verify['near_ties']:,} are near-ties, {verify['disagreements']:,} disagree.",
    ]
    text = "\n\n".join(parts) + "\n"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {out}")
    if verify["disagreements"]:
        return cli.fail(f"verification failed: {verify['worst']}")
    return None


if __name__ == "__main__":
    define_flags()
    cli.run(main)
