"""An echo on the direct transport: bytes in, the first 1,024 of them out. The floor under a request here.

No more come out, since an answer of a network is mostly smaller than what was asked. The sockets and the protocol are
the server's own (`transport.http2`); what is left out is everything behind them.

Prints `grpc HOST:PORT` and `ready`; ends on SIGTERM.
"""

from __future__ import annotations

import gc
import signal
import threading

from forwardpass.transport.http2.connection import Connection
from forwardpass.transport.http2.limits import ConnectionLimits
from forwardpass.transport.http2.peer import Peer
from forwardpass.transport.http2.sockets import Sockets
from forwardpass.transport.memory_budget import MemoryBudget
from harness import METHOD


def main() -> None:
    limits = ConnectionLimits(1024, 16384, 1 << 24)
    budget = MemoryBudget(1 << 30)

    def connect(client: Peer) -> Connection:
        return Connection(limits, budget, METHOD.encode(), lambda _: None, sockets.transmit, client)

    sockets = Sockets("127.0.0.1", 0, connect, 0.0)
    over = threading.Event()

    def echo() -> None:
        while not over.is_set():
            sockets.poll(wait=True)
            for connection in sockets.read(256):
                with connection.out.lock:
                    connection.out.respond([(call, bytes(1024), ()) for call, _ in connection.arrived])
                connection.arrived.clear()
                connection.cancelled.clear()
            sockets.sweep()
        sockets.close()

    gc.freeze()
    thread = threading.Thread(target=echo)
    thread.start()
    print(f"grpc 127.0.0.1:{sockets.port}\nready", flush=True)
    signal.sigwait({signal.SIGTERM})
    over.set()
    sockets.wake()
    thread.join(5.0)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main()
