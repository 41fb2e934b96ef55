"""`python -m experiments.truth`: the script of `experiments.samplers.truth`."""

from experiments import cli
from experiments.samplers import truth

if __name__ == "__main__":
    cli.start(truth)
