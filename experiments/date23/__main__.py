"""DATE'23 reproduced: how many faults to inject and where, and whether the samples tell the truth.

Ruospo et al., "Assessing convolutional neural networks reliability through statistical fault
injections", DATE 2023: Tables I to III, Figures 3 to 7, and its validation against the exhaustive
truth, which here is 200 campaigns a method in place of one.

    python -m experiments.date23 --smoke

trains LeNet on scikit-learn's digits, makes its truth and writes date23.md, validation.csv and
five figures to runs/date23: a minute on 2 cores. In full, for any network whose truth was made
before, without one inference more:

    python -m experiments.truth --net=lenet --dataset=mnist.npz --images=200 --out=truth.npz
    python -m experiments.date23 --truth=truth.npz

take two minutes and 75 s on 2 cores. Of 3,934,080 faults 0.817% are critical; the average margin
of a layer is 2.0% network-wise, 0.24% layer-wise, 0.04% data-unaware and 0.05% data-aware, in the
order of the paper's. The margin holds the truth of layers in 94% of network-wise campaigns, of
bits in 64% of data-aware ones, which draw nothing where they take p for 0. On ResNet-20,

    python -m experiments.truth --net=resnet20 --weights=resnet20-12fca82f.th \\
        --dataset=cifar10 --images=64 --sites='(conv1|linear)/kernel' --share=0.02 --out=truth.npz

takes 16 minutes on 3 shared cores, and the script 25 s: campaigns are run on the first and the last
layer, the tables of sample sizes and p are of all 20. 2.933% of the 68,608 faults are critical;
average margins are 0.48, 0.33, 0.05 and 0.08%, and the margin holds the truth of layers in 98.5 to
99.2% of campaigns, of bits in 64% of data-aware ones. The truth of all 20 layers, which takes 69
minutes on 3 shared cores with --images=16 alone, comes with the project:

    python -m experiments.date23 --truth=experiments/truths/resnet20.npz

takes 7 minutes on a shared core. 0.723% of 17,173,504 faults are critical; the average margin of a
layer is 1.18% network-wise (the paper, another 10,000 images: 1.57%), 0.18% layer-wise (0.19%),
0.03% data-unaware (0.06%) and 0.03% data-aware (0.08%). The margin holds the truth of layers in 81%
of network-wise campaigns and 99% of the others, of bits in 64% of data-aware ones.

Without --truth the campaigns are run, each of the four and ten samples of the first layer by each
method, and go on where they were stopped; there is then nothing to validate against:

    python -m experiments.date23 --net=resnet20 --weights=resnet20-12fca82f.th \\
        --dataset=cifar10 --images=16

Tables I and II are printed for the paper's two networks in every run; they follow from the sizes
of the layers. In Table I the paper counts ten biases of the last layer with the kernel of layer
11, which so has 9,226 words. Its rule for outliers of p is not stated; --outliers names ours.
"""

from pathlib import Path

from absl import flags

import nets
from experiments import cli, target
from experiments.date23.reproduction import Subject, of_network, of_truth, reproduce, smoke_truth
from experiments.samplers import truth as truths
from jfi.errors import InputError
from jfi.sampling import estimates, sampling


def define_flags() -> None:
    """Flags of this script."""
    flags.DEFINE_bool("smoke", False, "LeNet on digits, from its training on, in short.")
    flags.DEFINE_string(
        "truth", None, "A file of experiments.truth, in place of a network: no fault is run."
    )
    target.define_network()
    target.define_workload()
    target.define_request(t=2.58)
    flags.DEFINE_enum(
        "outliers",
        "tukey",
        list(sampling.OUTLIERS),
        "Bits that get p = 0.5 and are left out of the scale of the others: those beyond Tukey's "
        "fence on the order of magnitude of their distance, or none. The paper does not say.",
    )
    flags.DEFINE_integer("repeats", 200, "Campaigns a method to hold against the truth.", 0)
    flags.DEFINE_string("out", "runs/date23", "Folder for tables and figures.")


def main() -> int | None:
    """Reproduce the paper as the flags ask."""
    args = flags.FLAGS
    if args.smoke and args.truth:
        raise InputError("--smoke makes its own truth; give it or --truth")
    request = sampling.check(target.request())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    # Layer and bit together are most of the units, and of the time.
    levels = estimates.LEVELS[:3] if args.smoke else estimates.LEVELS
    subject, whole = _subjects(out)
    outliers = sampling.OUTLIERS[args.outliers]
    print(reproduce(subject, whole, request, outliers, args.repeats, levels, out))
    print(f"written to {out}")
    return None


def _subjects(out: Path) -> tuple[Subject, Subject]:
    """What campaigns are run on, and the whole network, as the flags ask."""
    args = flags.FLAGS
    if args.smoke or args.truth:
        return of_truth(smoke_truth(out) if args.smoke else truths.load(args.truth))
    dataset = target.dataset()
    subject = of_network(nets.build(args.net, dataset.x_test.shape[1:]), dataset, out)
    return subject, subject


if __name__ == "__main__":
    define_flags()
    cli.run(main)
