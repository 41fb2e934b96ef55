"""Importing torchax beside a torch that dropped overloads which its tables name.

torchax 0.0.13 lists `aten.prod.dim_Dimname` and others of its kind, which torch 2.13 has no more,
and fails to import. While it imports, an overload that is not there is looked up as a stand-in
that no call ever meets. This file goes when a torchax imports beside that torch by itself.
"""

import contextlib
import logging
import sys
from types import ModuleType

from jfi.adopt.adopted import library


def torchax() -> ModuleType:
    """The module torchax, with the settings of torch that its import changes as they were.

    Raises:
      InputError: it is not installed.
    """
    import torch

    if "torchax" in sys.modules:
        return sys.modules["torchax"]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with _tolerant(torch._ops.OpOverloadPacket), _quiet():
            found = library("torchax", "torch")
            found.default_env()  # imports the rest
            return found
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _tolerant(packet: type):
    """Overloads that an operator does not have are stand-ins, each of its own."""
    strict = packet.__getattr__

    def tolerant(self, name):
        try:
            return strict(self, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return object()

    packet.__getattr__ = tolerant
    try:
        yield
    finally:
        packet.__getattr__ = strict


@contextlib.contextmanager
def _quiet():
    """Without the warnings of operators registered twice, which are its own affair."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
