"""Inspection of a model's forward pass: its layers, representations, memory and batch size.

Reads ONNX files and runs them. Commands: trace, represent, memory, sweep. Serving imports `graph_svg` alone, which
draws and needs none of the libraries.

Imports `execution`, `model`, `console`, `client` and `testing`. Public are `graph_svg` (svg).
"""
