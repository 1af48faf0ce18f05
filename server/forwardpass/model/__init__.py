"""A model on disk: its signature, contract, options and ONNX graph, read and validated. Nothing is run."""
