"""How fast the engine is, beside its peers, on the same faults.

`benchmark` has the rows, `turns` how they take turns, `costs` where a campaign's time goes. Peers
are `peers` and `spiking_peer`, of `models` and `spiking_model`, in PyTorch and snnTorch. `zoo` has
networks of many kinds, `zoo_table` their table, `zoo_torch` some of them in PyTorch.
"""
