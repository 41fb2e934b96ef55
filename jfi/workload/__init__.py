"""Which images reveal faults: scores of images without a fault, and choices by them.

In: images, the network's answers, an embedding. Out: a `workload.Selection`, images in the order
they are of use (`workload`, `expected`, `kennard_stone`, `embedding`).
"""
