"""A user's network as data: the wing that everything about faults is read from.

In: `apply`, `params` and the shape of an image. Out: a `Network`: its equations one by one
(`program`), the sites that faults strike (`sites`; named values and state in `taps`; loops over
time in `scans`), and what a layer's weights say without a run (`scores`).
"""
