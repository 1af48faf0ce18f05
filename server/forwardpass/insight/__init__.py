"""What a forward pass does, seen on a model of yours: its layers, representations, memory and batch size.

Reads ONNX files and runs them; never imported by serving. Commands: trace, represent, memory, sweep.

Imports `execution`, `model`, `console`, `client` and `testing`. Nothing of it is for other packages.
"""
