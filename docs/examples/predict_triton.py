"""The same with NVIDIA's client, as for Triton: `python predict_triton.py [ADDRESS]`. Needs tritonclient[grpc]."""

import sys

import numpy as np
import tritonclient.grpc as triton

PIXELS = [
    [0,  1,  8, 10, 14, 10,  0, 0],
    [0, 12, 10,  6,  6, 16,  2, 0],
    [0,  3,  0,  0,  7, 14,  1, 0],
    [0,  0,  0,  0,  9, 11,  0, 0],
    [0,  0,  0,  0,  2, 16,  1, 0],
    [0,  0,  0,  0,  0,  8, 12, 0],
    [0,  0,  4,  0,  2, 11,  9, 0],
    [0,  0, 12, 16, 14, 12,  4, 0],
]  # fmt: skip

address = sys.argv[1] if len(sys.argv) > 1 else "localhost:8001"
client = triton.InferenceServerClient(address)
x = triton.InferInput("x", [1, 64], "FP32")
x.set_data_from_numpy(np.array(PIXELS, np.float32).reshape(1, 64))
logits = client.infer("digits", [x], client_timeout=2.0).as_numpy("logits")[0]
print(f"digit {logits.argmax()}, logit {logits.max():.3f}")
client.close()
