"""tritonclient's own shared-memory helpers against a server of `digits`; prints the logits as JSON.

Run by the tools' Python.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm


def main(address: str) -> list[list[float]]:
    x = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)
    key = f"/forwardpass-conformance-{os.getpid()}"
    client = triton.InferenceServerClient(address)
    region = shm.create_shared_memory_region("region", key, x.nbytes + 80)
    try:
        shm.set_shared_memory_region(region, [x])
        client.register_system_shared_memory("region", key, x.nbytes + 80)
        given = triton.InferInput("x", [2, 64], "FP32")
        given.set_shared_memory("region", x.nbytes)
        wanted = triton.InferRequestedOutput("logits")
        wanted.set_shared_memory("region", 80, offset=x.nbytes)
        client.infer("digits", [given], outputs=[wanted])
        found = shm.get_contents_as_numpy(region, np.float32, [2, 10], offset=x.nbytes)
        return [[float(value) for value in row] for row in found]
    finally:
        client.unregister_system_shared_memory("region")
        shm.destroy_shared_memory_region(region)
        client.close()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
