"""Inspection of a model's forward pass: its layers, representations, memory and batch size.

Reads ONNX files and runs them; never imported by serving. Commands: trace, represent, memory, sweep.

Imports `execution`, `model`, `console`, `client` and `testing`. No module here is for other packages.
"""
