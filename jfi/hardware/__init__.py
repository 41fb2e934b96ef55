"""What the engine runs on: devices, compilers, and how much at a time.

In: the devices of this process. Out: `devices.Hardware`, which spreads work over them, one rule of
rounding for every compiled program (`compiling`), pieces of one size (`chunks`), and what was
measured to be fastest and is kept between runs (`tuning`).
"""
