"""What the engine runs on: devices that share the pairs of a chunk, and how large a chunk is.

Pairs are spread over the devices; golden values and weights are on all of them, so that a chunk
needs no word from one device to another. Images of a golden pass are spread likewise.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jfi.chunks import CHUNK_BYTES
from jfi.compiling import jit

SHARED, SPREAD = PartitionSpec(), PartitionSpec("pairs")


class Hardware(NamedTuple):
    """Devices, and bytes of the largest value of a chunk on one of them."""

    mesh: Mesh
    chunk_bytes: int = CHUNK_BYTES

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.mesh.size

    def jit(self, function: Callable, *specs: PartitionSpec, **options: Any) -> Callable:
        """Compile a function of arguments that are `SHARED` or `SPREAD`; its results are spread.

        It sees the share of one device.
        """
        return jit(
            jax.shard_map(
                function, mesh=self.mesh, in_specs=specs, out_specs=SPREAD, check_vma=False
            ),
            **options,
        )

    def jit_golden(self, function: Callable) -> Callable:
        """Compile a function of (leaves, images); its results are on all devices."""
        compiled = jit(function, out_shardings=NamedSharding(self.mesh, SHARED))

        def call(leaves, images):
            spec = SPREAD if len(images) % self.count == 0 else SHARED
            return compiled(leaves, jax.device_put(images, NamedSharding(self.mesh, spec)))

        return call

    def share(self, values: Any) -> Any:
        """`values`, a pytree of arrays, on all devices."""
        return jax.device_put(values, NamedSharding(self.mesh, SHARED))

    def zeros(self, rows: int, aval) -> jax.Array:
        """Zeros [rows a device, ...], spread."""
        shape = (self.count * rows, *aval.shape)
        return jax.numpy.zeros(shape, aval.dtype, device=NamedSharding(self.mesh, SPREAD))


def hardware(devices: Sequence[jax.Device] | None = None, **options: Any) -> Hardware:
    """The given devices, by default all of this process."""
    chosen = jax.local_devices() if devices is None else devices
    return Hardware(Mesh(np.array(chosen), ("pairs",)), **options)
