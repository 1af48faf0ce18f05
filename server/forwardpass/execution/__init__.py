"""Networks opened and run by an execution provider. The only package that imports onnxruntime."""
