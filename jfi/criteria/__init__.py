"""What makes a fault critical, asked of the outputs for one image.

In: a criterion (`criterion.Criterion`: by name, as `built_in.top_k(5)`, or one's own) and the form
of a network's outputs. Out: a `Judgement`, pure functions of rows of outputs, which the engine runs
and proves.
"""
