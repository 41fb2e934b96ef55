"""Statistical fault injection: which faults to draw, and what the drawn ones tell. No engine here.

In: a fault space and a request (error margin, confidence). Out: faults by stratum (`sampling`,
`strata`, `sfi`, `shuffle`, `methods`), and from what came of them estimates with margins and
intervals (`estimates`); `adaptive` draws in rounds by `betting`.
"""
