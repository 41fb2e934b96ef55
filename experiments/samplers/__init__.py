"""Samplers compared on networks whose every fault is known.

`truth` makes such knowledge, `benchmark` repeats campaigns against it, `table` sets the results
side by side. They run as experiments.truth, experiments.bench_samplers and
experiments.sampler_table.
"""
