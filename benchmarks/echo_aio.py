"""An echo on grpcio's asyncio server: bytes in, the same bytes out. What a Python service costs before it works.

Prints `grpc HOST:PORT` and `ready`; ends on SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import grpc


async def _echo(message: bytes, _context: Any) -> bytes:
    return message


async def main() -> None:
    server = grpc.aio.server()
    # No serializers: the handler is given the bytes and gives bytes, the least that grpcio can do.
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"grpc 127.0.0.1:{port}\nready", flush=True)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
