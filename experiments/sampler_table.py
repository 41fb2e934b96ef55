"""`python -m experiments.sampler_table`: the script of `experiments.samplers.table`."""

from experiments import cli
from experiments.samplers import table

if __name__ == "__main__":
    cli.start(table)
