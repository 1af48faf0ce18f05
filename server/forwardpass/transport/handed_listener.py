"""A listener whose connections another process accepts: they come through a socket, as descriptors (SCM_RIGHTS).

To the transports it is like any other listener. What the accepting process must know of the connections, to spread them
evenly, stands in memory that both share, where it costs a store to write.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
from collections.abc import MutableSequence
from typing import Final

_FIELDS: Final = 3


class PortCounts:
    """What a process shares of one port. Each field has one writer; another process may read it at any time."""

    def __init__(self, descriptor: int) -> None:
        """Map the memory behind `descriptor`, which may be closed afterwards."""
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._mapped = memoryview(self._memory).cast("q")
        self._fields: MutableSequence[int] | memoryview[int] = self._mapped

    @classmethod
    def made(cls) -> tuple[PortCounts, int]:
        """New memory, and its descriptor, for a child process and to be closed."""
        descriptor = os.memfd_create("forwardpass-port")
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            return cls(descriptor), descriptor
        except OSError:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Give the memory back, and the descriptor that the mapping keeps. The last values can still be read."""
        self._fields = list(self._mapped)
        self._mapped.release()
        self._memory.close()

    @property
    def taken(self) -> int:
        """Connections received so far."""
        return self._fields[0]

    @taken.setter
    def taken(self, count: int) -> None:
        self._fields[0] = count

    @property
    def open(self) -> int:
        """Connections that are open."""
        return self._fields[1]

    @open.setter
    def open(self, count: int) -> None:
        self._fields[1] = count

    @property
    def turns(self) -> int:
        """How often the thread that reads them came round; it does so every second at least unless it hangs."""
        return self._fields[2]

    @turns.setter
    def turns(self, count: int) -> None:
        self._fields[2] = count


class HandedListener:
    """Receives connections from the process that accepts them, through `channel`. For one thread."""

    family = int(socket.AF_INET)

    def __init__(self, channel: socket.socket, port: int, counts: PortCounts) -> None:
        """`channel`: of type SOCK_SEQPACKET, each message with one connection. `port`: where they were accepted."""
        channel.setblocking(False)
        self._channel = channel
        self.port = port
        self.counts = counts

    def fileno(self) -> int:
        return self._channel.fileno()

    def accept(self) -> tuple[socket.socket, object]:
        size = array.array("i").itemsize
        data, control, _, _ = self._channel.recvmsg(1, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise ConnectionResetError(0, "the process that accepts connections has ended")
        self.counts.taken += 1
        descriptors = array.array("i")
        for _, _, carried in control:
            descriptors.frombytes(carried[: len(carried) - len(carried) % size])
        if not descriptors:  # this process had no descriptor left for it
            raise ConnectionAbortedError(0, "no descriptor came with it")
        return socket.socket(fileno=descriptors[0]), None

    def getsockopt(self, level: int, option: int, /) -> int:
        """Whether it listens is for the accepting process to know; the channel itself is asked everything else."""
        listens = (level, option) == (socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return 1 if listens else self._channel.getsockopt(level, option)

    def getsockname(self) -> tuple[str, int]:
        return "", self.port

    def close(self) -> None:
        self._channel.close()


Listener = socket.socket | HandedListener
