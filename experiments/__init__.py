"""Scripts: data sets, training, campaigns. Each runs as `python -m experiments.NAME --help`.

The main job is `plan`, `campaign` and `report`. A room with one script runs under its own name:
`data`, `train`, `bench`, and the papers `date23`, `dear_cnn`, `spikingjet`. All start and end as
`cli` says; `target` reads from flags what is under test, `machine` tells what it runs on.
"""
