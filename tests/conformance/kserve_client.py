"""KServe's InferenceGRPCClient against a server of `digits`; prints what it found as JSON. Run by the tools' Python."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.infer_type import RequestedOutput


async def main(address: str) -> dict[str, Any]:
    client = InferenceGRPCClient(url=address, timeout=30)
    x = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)

    async def infer(data: Any, **more: Any) -> Any:
        given = InferInput(name="x", shape=[2, 64], datatype="FP32", data=data)
        return await client.infer(InferRequest(model_name="digits", infer_inputs=[given], request_id="mine", **more))

    try:
        raw = await infer(x)
        typed = await infer(x.ravel().tolist())
        wanted = await infer(x, request_outputs=[RequestedOutput(raw.outputs[0].name, {"binary_data": False})])
        refused = ""
        try:
            await client.is_model_ready("nobody")
        except Exception as error:
            refused = str(error.code()) if hasattr(error, "code") else repr(error)
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model_ready": await client.is_model_ready("digits"),
            "nobody": refused,
            "id": raw.id,
            "version": raw.model_version,
            "raw": raw.outputs[0].as_numpy().tolist(),
            "typed": typed.outputs[0].as_numpy().tolist(),
            "wanted_typed": np.asarray(wanted.outputs[0].data).reshape(2, 10).tolist(),
        }
    finally:
        await client.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))
