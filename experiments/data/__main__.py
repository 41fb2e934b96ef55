"""Data sets, and preparing them.

Sets known by name: `digits` ships with scikit-learn (1,797 images of 8x8), `text` with Python (its
reference of the language, 32 characters a text, each told by the next; for --net=gpt); `mnist` and
`cifar10` are read as tensorflow-datasets prepared them, with no network access; `nmnist`, `shd` and
`dvs128gesture` are recordings of events in the folder --data_dir (experiments.data.events says
which files), read and binned into frames by tonic (pip install 'jfi[events]'). Anything else is a
.npz file with x_test and y_test, and x_train and y_train for training: images [B, H, W, C] or
[B, H, W], uint8, bool or floats in [0, 1]; labels [B], integers from 0. uint8 is divided by 255, or
by --pixel_max, which has to be said where all is 0 and 1. With an array `frames`, which says how
they were binned, x_test and x_train are counts of events by time step, [B, T, H, W, P] or
[B, T, channels].

Recordings are binned once, into a file that loads at once:

    python -m experiments.data --dataset=nmnist --data_dir=FOLDER --out=nmnist.npz

bins them as SpikingJET's released networks want them; --steps, --bin_by, --window_us, --every,
--denoise_us and --binary bin them otherwise.

Preparing mnist and cifar10 is done once. tensorflow-datasets needs TensorFlow installed for it
(pip install tensorflow-cpu), though not for reading what was prepared:

    python -m experiments.data --dataset=mnist --data_dir=DIR

downloads the set. Without network access, put the four official files
({train,t10k}-{images-idx3,labels-idx1}-ubyte.gz) in a folder and say where:

    python -m experiments.data --dataset=mnist --manual_dir=FOLDER --data_dir=DIR

Without TensorFlow, turn the same files into a .npz and use that as --dataset:

    python -m experiments.data --dataset=mnist --manual_dir=FOLDER --out=mnist.npz
"""

from pathlib import Path

from absl import flags

from experiments import cli
from experiments.data import events
from experiments.data.sets import DATA_DIR, FRAMES, PREPARED, convert_mnist, prepare, write_npz
from jfi.errors import InputError


def define_flags() -> None:
    """Flags of this script."""
    known = (*PREPARED, *events.SOURCES)
    flags.DEFINE_enum("dataset", "mnist", known, "The set to prepare.")
    flags.DEFINE_string(
        "data_dir",
        DATA_DIR,
        "Where tensorflow-datasets keeps prepared sets; of a set of events, where its files are.",
    )
    flags.DEFINE_string("manual_dir", None, "Folder of the official files; else: download.")
    flags.DEFINE_string(
        "out", None, "Write this .npz: a set of events, or mnist, which needs --manual_dir."
    )
    flags.DEFINE_integer("steps", None, "Of events: time steps, frames of a recording.", 1)
    flags.DEFINE_enum(
        "bin_by",
        None,
        events.WAYS,
        "Of events: frames of equal time (usual), of equal numbers of events, or of --window_us "
        "from time 0, cut off or filled at --steps.",
    )
    flags.DEFINE_integer("window_us", None, "With --bin_by=window: microseconds of a frame.", 1)
    flags.DEFINE_integer("every", None, "Of events: every so-manieth row and column is kept.", 1)
    flags.DEFINE_integer(
        "denoise_us",
        None,
        "Of cameras: an event without one at a direct neighbour in so many microseconds before it "
        "is dropped; 0 keeps all.",
        0,
    )
    flags.DEFINE_bool("binary", None, "Of events: 1 for any in a frame, not their number.")


def main() -> None:
    """Prepare the set that the flags name."""
    args = flags.FLAGS
    data_dir = Path(args.data_dir).expanduser()
    if args.dataset in events.SOURCES:
        _convert_events(args.dataset, data_dir, args.out)
        return
    if args.out is None:
        folder = prepare(args.dataset, data_dir, args.manual_dir)
        print(f"{args.dataset}: prepared in {folder}")
        return
    if args.dataset != "mnist" or args.manual_dir is None or not args.out.endswith(".npz"):
        raise InputError("--out=FILE.npz goes with --dataset=mnist and --manual_dir=FOLDER")
    convert_mnist(args.manual_dir, args.out)
    print(f"mnist: written to {args.out}")


def _convert_events(name: str, folder: Path, out: str | None) -> None:
    """Bin recordings as the flags say, and write them."""
    if out is None or not out.endswith(".npz"):
        raise InputError(f"--out={out}: --dataset={name} goes into a file, --out=FILE.npz")
    arrays = events.load(name, folder, _binning(events.SOURCES[name].usual))
    write_npz(out, arrays)
    print(f"{arrays[FRAMES]}: written to {out}")
    for split in ("train", "test"):
        if f"x_{split}" in arrays:
            print(f"{split}: {len(arrays[f'y_{split}'])} of {arrays[f'x_{split}'].shape[1:]}")


def _binning(usual: events.Binning) -> events.Binning:
    """The usual binning but for what the flags say."""
    args = flags.FLAGS
    given = {
        "steps": args.steps,
        "by": args.bin_by,
        "window": args.window_us,
        "every": args.every,
        "denoise": args.denoise_us,
        "binary": args.binary,
    }
    return usual._replace(**{key: value for key, value in given.items() if value is not None})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
