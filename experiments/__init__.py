"""Scripts: data sets, training, campaigns. Each runs as `python -m experiments.NAME --help`."""
