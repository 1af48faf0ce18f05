"""An echo on pygrpc-native: bytes in, the first 1,024 of them out. What a Rust library takes.

No more come out, since an answer of a network is mostly smaller than what was asked.

Prints `grpc HOST:PORT` and `ready`; ends on SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import threading

from pygrpc_native import EVENT_CALL, NativeGrpcFront

from harness import METHOD


def main() -> None:
    sys.setswitchinterval(0.001)  # as the server has it
    front = NativeGrpcFront("127.0.0.1:0", [(METHOD, False)], io_threads=1, call_details=True)
    front.start()

    def echo() -> None:
        respond = front.respond
        while (events := front.recv_batch_details(256)) is not None:
            for kind, call, _, message, _, _ in events:
                if kind == EVENT_CALL and message is not None:
                    respond(call, message[:1024])

    thread = threading.Thread(target=echo)
    thread.start()
    print(f"grpc 127.0.0.1:{front.bound_port}\nready", flush=True)
    signal.sigwait({signal.SIGTERM})
    front.close()
    thread.join(5.0)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main()
