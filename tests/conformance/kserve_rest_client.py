"""KServe's InferenceRESTClient against a server of `digits`; prints what it found as JSON. Run by the tools' Python."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig


async def refused(work: Awaitable[Any]) -> str:
    """The error's text."""
    try:
        await work
    except httpx.HTTPStatusError as error:
        return str(error)
    return ""


async def main(url: str) -> dict[str, Any]:
    v1, v2 = (InferenceRESTClient(RESTConfig(protocol=version, timeout=30)) for version in ("v1", "v2"))
    x = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)

    async def infer(binary: bool) -> Any:
        given = InferInput(name="x", shape=[2, 64], datatype="FP32")
        given.set_data_from_numpy(x, binary_data=binary)
        more = {"parameters": {"binary_data_output": True}} if binary else {}
        request = InferRequest(model_name="digits", infer_inputs=[given], request_id="mine", **more)
        return await v2.infer(url, request, model_name="digits")

    try:
        raw, typed = await infer(True), await infer(False)
        predicted = await v1.infer(url, {"instances": x.tolist()}, model_name="digits")
        return {
            "live": [await v1.is_server_live(url), await v2.is_server_live(url)],
            "ready": await v2.is_server_ready(url),
            "model_ready": [await client.is_model_ready(url, "digits") for client in (v1, v2)],
            "nobody": [await refused(v1.is_model_ready(url, "nobody")), await v2.is_model_ready(url, "nobody")],
            "explain": await refused(v1.explain(url, "digits", {"instances": x.tolist()})),
            "id": raw.id,
            "raw": raw.outputs[0].as_numpy().tolist(),
            "typed": typed.outputs[0].as_numpy().tolist(),
            "predicted": np.array(predicted["predictions"], np.float32).tolist(),
        }
    finally:
        await v1.close()
        await v2.close()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))
