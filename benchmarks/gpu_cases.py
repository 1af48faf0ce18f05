"""What bench_gpu.py measures: networks, batches, ways to run them; and what the device could do at best. Pure.

A way is timed from host to host (a batch in the host's memory to its answers there, as a server has it) or on the
device alone (both stay in its memory). The floors hold for the second kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

NETWORKS: dict[str, tuple[int, ...]] = {
    "64-256-256-10": (64, 256, 256, 10),
    "784-512-512-10": (784, 512, 512, 10),
    "1024-4096-4096-1000": (1024, 4096, 4096, 1000),
}
BATCHES = (1, 8, 64, 512, 4096)
# tf32: FP32 whose products have 10 bits of mantissa.
PRECISIONS = ("fp32", "tf32", "fp16")
ITEMSIZE = {"fp32": 4, "tf32": 4, "fp16": 2}

HOST = {
    "ort": "ONNX Runtime",
    "ort-bound": "ONNX Runtime, IOBinding",
    "forwardpass": "Forwardpass",
    "torch": "PyTorch",
    "torch-graph": "PyTorch, CUDA graph",
}
DEVICE = {
    "ort-bound.device": "ONNX Runtime, IOBinding",
    "ort-graph.device": "ONNX Runtime, CUDA graph",
    "torch.device": "PyTorch",
    "torch-graph.device": "PyTorch, CUDA graph",
    "matmul.device": "torch.matmul alone",
}
WAYS = {**HOST, **DEVICE}

ROOF = "roof"  # in place of a network: the device itself
COPY, MATMUL = "copy", "matmul"
MIXED = "mixed"  # a way of its own: batches of all sizes, by gpu_memory.py


@dataclass(frozen=True, slots=True)
class Case:
    """One figure: a network, the rows of a batch, a precision, a way. Or a roof: way `copy` or `matmul`."""

    network: str
    batch: int
    precision: str
    way: str

    @property
    def key(self) -> str:
        return f"{self.network}/{self.batch}/{self.precision}/{self.way}"

    @classmethod
    def of(cls, key: str) -> Case:
        network, batch, precision, way = key.split("/")
        return cls(network, int(batch), precision, way)


def cases(
    networks: Sequence[str], batches: Sequence[int], precisions: Sequence[str], ways: Sequence[str]
) -> list[Case]:
    """The roofs first, then a network after the other, so that a process builds each once."""
    roofs = [Case(ROOF, 0, "fp32", COPY), *(Case(ROOF, 0, precision, MATMUL) for precision in precisions)]
    return roofs + [
        Case(network, batch, precision, way)
        for network, precision, batch, way in itertools.product(networks, precisions, batches, ways)
    ]


def flops(widths: Sequence[int], batch: int) -> int:
    """Of the products: a multiplication and an addition for each weight and row."""
    return 2 * batch * sum(before * after for before, after in itertools.pairwise(widths))


def least_bytes(widths: Sequence[int], batch: int, itemsize: int) -> int:
    """What must cross the memory bus at least: every weight and bias once, inputs once, answers once.

    Inputs and answers are FP32 in every precision. Activations between layers are left out: a perfect program would
    keep them on the chip.
    """
    stored = sum((before + 1) * after for before, after in itertools.pairwise(widths))
    return stored * itemsize + 4 * batch * (widths[0] + widths[-1])


@dataclass(frozen=True, slots=True)
class Roofs:
    """What the device was measured to do."""

    bytes_per_second: float
    flops_per_second: float  # in the precision asked about


@dataclass(frozen=True, slots=True)
class Floors:
    """Seconds that a batch takes at least, by each of the two roofs."""

    memory: float
    products: float

    @property
    def larger(self) -> float:
        return max(self.memory, self.products)


def floors(network: str, batch: int, precision: str, roofs: Roofs) -> Floors:
    widths = NETWORKS[network]
    return Floors(
        memory=least_bytes(widths, batch, ITEMSIZE[precision]) / roofs.bytes_per_second,
        products=flops(widths, batch) / roofs.flops_per_second,
    )
