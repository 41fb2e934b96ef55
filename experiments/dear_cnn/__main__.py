"""DEAR-CNN reproduced: a few challenging images find nearly every critical fault, and fewer do.

Bellarmino et al., "DEAR-CNN: Data-efficient assessment of resiliency in convolutional neural
networks", DDECS 2025: Tables I to IV and Figures 1 to 3 for any network, the times of its model (1
ms an inference) beside measured ones, and all metrics and selections at equal numbers of images,
beside what no choice of images can exceed.

    python -m experiments.dear_cnn --smoke

trains LeNet on scikit-learn's digits and writes dear_cnn.md, comparison.csv and four figures to
runs/dear_cnn: 45 s on one core. In full:

    python -m experiments.dear_cnn --net=lenet --dataset=mnist.npz
    python -m experiments.dear_cnn --net=resnet20 --weights=resnet20-12fca82f.th \\
        --dataset=cifar10_exact.npz

On 10,000 images of MNIST, EL2N in central mode takes 0.74% of them (0.84% in the paper) and finds
1,149 of 1,163 critical faults, 5 random selections as large 274 on average; it needs labels. Our
selection `expected`, without labels, finds as many with fewer images (docs/workloads.md). On
one core that other work shared the first list took 19 minutes (MNIST) and 74 (ResNet-20), each of
ResNet-20's others 20, all else a few.

Faults are bit flips: the paper calls them stuck-at, but "an injected fault involves flipping a
random bit". --fault_model=stuck_at injects the other kind. The campaign of each seed is run once,
its verdicts by image kept in OUT/campaigns; tables and figures are made from them, and made again
without an inference more. The first seed's campaign tells masked from non-critical unless
--measure=critical.

Where the paper's words leave room: the centre of central mode is the metric on the border of two
classes (0.707 for EL2N); the plateau begins where all further steps between sorted values are
below --slope.
"""

from pathlib import Path

from absl import flags

import nets
from experiments import cli, target
from experiments.data import sets
from experiments.dear_cnn.reproduction import reproduce, subject_of
from experiments.train.training import smoke_weights
from jfi.errors import InputError
from jfi.faults import FAULT_MODELS
from jfi.workload import workload


def define_flags() -> None:
    """Flags of this script."""
    flags.DEFINE_bool("smoke", False, "LeNet on digits, from its training on.")
    target.define_network()
    target.define_workload()
    flags.DEFINE_enum("fault_model", "flip", list(FAULT_MODELS), "Flips, or bits stuck.")
    flags.DEFINE_float("error_margin", 0.01, "Error margin e that sizes the fault list, in (0, 1).")
    flags.DEFINE_float("confidence", 0.99, "Its confidence, in (0, 1).")
    flags.DEFINE_float("t", 2.58, "Normal quantile of the confidence, as in the paper.")
    flags.DEFINE_integer(
        "seeds", 5, "Fault lists of Table III and the comparison; all else is of the first.", 1
    )
    flags.DEFINE_enum(
        "measure",
        "full",
        ["full", "critical"],
        "Of the first list: tell masked from non-critical, or only critical, which is faster.",
    )
    flags.DEFINE_float("epsilon", workload.EPSILON, "Of central mode, around EL2N = 0.707.")
    flags.DEFINE_float("slope", workload.SLOPE, "Of the plateau, per image.")
    flags.DEFINE_bool("times", True, "Measure times for Table IV.")
    flags.DEFINE_integer("verify", 200, "Pairs of each campaign to run again naively.", 0)
    flags.DEFINE_string("out", "runs/dear_cnn", "Folder for campaigns, tables and figures.")


def main() -> int | None:
    """Reproduce the paper as the flags ask."""
    args = flags.FLAGS
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    dataset = sets.load("digits") if args.smoke else target.dataset()
    net = nets.build("lenet" if args.smoke else args.net, dataset.x_test.shape[1:])
    if args.smoke:
        weights = smoke_weights(net, dataset, out)
    else:
        weights = target.weights_path(net, dataset.name)
        net = target.normalising(net, weights)
    subject = subject_of(net, dataset, weights, out)
    if not subject.campaigns[0].total:
        raise InputError(
            f"no fault of seed 0 is critical for any of {subject.images:,} images; there is "
            "nothing to find. Give more --images, or a smaller --error_margin"
        )
    print(reproduce(subject, args.times, out))
    print(f"written to {out}")
    return None


if __name__ == "__main__":
    define_flags()
    cli.run(main)
