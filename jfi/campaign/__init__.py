"""From a plan to a record: faults chosen, run in shards, kept safe against a kill.

In: a sampler's plan or method, an `Engine`, a work directory. Out: outcomes and a summary on disk
(`records`), of all faults at once (`campaign`) or in rounds (`rounds`), verified by naive runs;
`detection` asks of a record which images reveal its faults.
"""
