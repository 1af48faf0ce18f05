"""Calls and cancels on one channel of whatever grpcio runs this: `old_grpc_cancels.py ADDRESS PATH MESSAGE_FILE`.

Prints as JSON how many calls were answered beside those that were cancelled at once, and how the others ended.
"""

from __future__ import annotations

import collections
import json
import sys
import threading
from pathlib import Path

import grpc

SIDE_BY_SIDE = 8  # threads
ROUNDS = 60
CANCELS = 50  # in a round, before a call that waits for its answer: no more than the server takes at once


def main(address: str, path: str, file: str) -> None:
    message = Path(file).read_bytes()
    ended: collections.Counter[str] = collections.Counter()
    with grpc.insecure_channel(address) as channel:
        method = channel.unary_unary(path)

        def call() -> None:
            for _ in range(ROUNDS):
                for _ in range(CANCELS):
                    method.future(message, timeout=30).cancel()
                try:
                    method(message, timeout=30)
                    ended["answered"] += 1
                except grpc.RpcError as error:
                    ended[f"{error.code().name}: {error.details()}"] += 1

        threads = [threading.Thread(target=call) for _ in range(SIDE_BY_SIDE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(json.dumps({"grpcio": grpc.__version__, "asked": SIDE_BY_SIDE * ROUNDS, "ended": ended}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
