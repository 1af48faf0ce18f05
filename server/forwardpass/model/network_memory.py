"""What an open network takes of memory, from its files: its weights, and what ONNX Runtime has beside them for nodes.

Measured on the CPU with ONNX Runtime 1.32, as resident memory after opening and one run: for 17 to 270 MB of weights
the files' bytes and 0.2 to 8 % more; for 1,000 to 30,000 small nodes 3.2 KB each. While a network is opened, the
weights of one file are in memory up to twice. Runs' memory is not in it.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

from forwardpass.errors import ModelError
from forwardpass.model.external_data import locations
from forwardpass.model.onnx_file import fields

OF_A_SESSION: Final = 256 << 10  # the session itself, and what the server has for a model
OF_A_NODE: Final = 3300


def network_memory(path: Path) -> int:
    """Bytes that the network in a file will take. Raises ModelError where it cannot be read or is no ONNX file.

    A file in another format counts for its size.
    """
    files = {path.resolve()}
    nodes = 0
    if path.suffix == ".onnx":
        files |= {(path.parent / location).resolve() for location in locations(path)}
        nodes = _nodes(path)
    try:
        return sum(file.stat().st_size for file in files) + OF_A_NODE * nodes + OF_A_SESSION
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}") from None


def _nodes(path: Path) -> int:
    """Nodes of the main graph and of functions; those within nodes are few beside them."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            count = 0
            for number, _, start, stop in fields(data, 0, len(data)):
                of_node = {7: 1, 25: 7}.get(number)  # ModelProto.graph: its node; .functions: theirs
                if of_node is not None:
                    count += sum(entry.number == of_node for entry in fields(data, start, stop))
            return count
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError):
        raise ModelError(f"{path.name} is not an ONNX file, or was cut short") from None
