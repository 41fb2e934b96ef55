"""One small network for each question that can be asked of a fault, trained here in seconds.

`data` makes what they are trained and judged on, `networks` has them, `training` trains them and
tells how good they are.
"""
