"""A test double: a gRPC server of the inference protocol that answers at once, but for one stall of everything.

    python tests/load/stalling_server.py --stall 0.5 --at 400

It serves a model `stall` (x FP32 [B, 4] -> y FP32 [B, 1]) on grpcio's asyncio server. On the inference with the number
`--at` its one thread sleeps for `--stall` seconds, once: nobody is answered meanwhile, as in a long garbage collection
or a paused virtual machine. Prints `grpc HOST:PORT` and `ready`; ends on SIGTERM, and then says how often it stalled.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from typing import Any

import grpc
import grpc.aio

from forwardpass import protocol


class _Stall:
    def __init__(self, seconds: float, at: int) -> None:
        self._seconds, self._at = seconds, at
        self._count = self.times = 0

    def pass_by(self) -> None:
        """Called by every inference; one of them sleeps."""
        self._count += 1
        if self._count == self._at:
            self.times += 1
            time.sleep(self._seconds)  # the event loop's thread: everything stands still


def _handlers(stall: _Stall) -> dict[str, Any]:
    answer = protocol.ModelInferResponse(model_name="stall", model_version="1")
    answer.outputs.add(name="y", datatype="FP32", shape=[1, 1])
    answer.raw_output_contents.append(b"\0" * 4)
    metadata = protocol.ModelMetadataResponse(name="stall", versions=["1"])
    metadata.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
    metadata.outputs.add(name="y", datatype="FP32", shape=[-1, 1])
    infer_bytes, metadata_bytes = answer.SerializeToString(), metadata.SerializeToString()

    async def infer(_message: bytes, _context: Any) -> bytes:
        stall.pass_by()
        return infer_bytes

    async def describe(_message: bytes, _context: Any) -> bytes:
        return metadata_bytes

    called = {"ModelInfer": infer, "ModelMetadata": describe}
    return {name: grpc.unary_unary_rpc_method_handler(function) for name, function in called.items()}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stall", type=float, default=0.5)
    parser.add_argument("--at", type=int, default=400)
    args = parser.parse_args()
    stall = _Stall(args.stall, args.at)
    server = grpc.aio.server()
    handlers = _handlers(stall)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(protocol.INFERENCE_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"grpc 127.0.0.1:{port}\nready", flush=True)
    await stop.wait()
    await server.stop(0)
    print(f"stalled {stall.times}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
