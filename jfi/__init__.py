"""jfi: what happens to a neural network when a bit of it breaks.

`study` is the front door, `load` opens its results later. Below it, the data's way: `adopt` (a
model of any framework) or `network` (a function and its parameters, both unedited) and its sites,
`plan` (which faults), `Engine` (golden run and outcomes), `run` (a campaign on record), estimates
and report.
"""

from jfi.adopt import adopt
from jfi.campaign.campaign import plan, plan_listed, run
from jfi.engine.engine import Engine
from jfi.errors import InputError, VerificationError
from jfi.faults import Faults, FaultSpace, Site, fault_list, read_fault_list
from jfi.networks.sites import listable, network, select
from jfi.sampling.estimates import Estimate
from jfi.sampling.sampling import Request
from jfi.study.result import load
from jfi.study.study import study

__all__ = [
    "Engine",
    "Estimate",
    "FaultSpace",
    "Faults",
    "InputError",
    "Request",
    "Site",
    "VerificationError",
    "adopt",
    "fault_list",
    "listable",
    "load",
    "network",
    "plan",
    "plan_listed",
    "read_fault_list",
    "run",
    "select",
    "study",
]
