"""Training networks of `nets` on data sets.

`training` trains, `checkpoint` keeps a run that may be killed, `card` says where weights come from.
"""
