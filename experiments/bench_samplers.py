"""`python -m experiments.bench_samplers`: the script of `experiments.samplers.benchmark`."""

from experiments import cli
from experiments.samplers import benchmark

if __name__ == "__main__":
    cli.start(benchmark)
