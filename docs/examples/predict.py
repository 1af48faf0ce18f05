"""Asks `digits` what an image of 8x8 pixels shows, with Forwardpass' own client: `python predict.py [ADDRESS]`."""

import sys

import numpy as np

from forwardpass import Client
from forwardpass.client import CallError

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
with Client(address, timeout=2.0) as client:  # seconds; the server schedules by it
    try:
        answer = client.infer("digits", np.array(PIXELS, np.float32).reshape(1, 64))
    except CallError as error:  # its status, and a text that says what was expected and what came
        sys.exit(f"predict: {error}")
best = answer.top(1)[0][0]
print(f"digit {best.label}, logit {best.value:.3f}")
