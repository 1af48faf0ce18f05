"""A model on disk: its signature, contract, options and ONNX graph, read and validated. Nothing is run.

Imports `errors`, `optional_imports` and `protocol`. Public are `contract` (CONTRACT_FILE, Contract, MODEL_FILE,
Samples, Tolerance, compare, file_digest), `contract_tensor` (ContractTensor, DTYPES), `example_inputs` (example,
with_sizes), `external_data`, `network_memory` (network_memory), `network_shape` (network_shape), `onnx_file` (OnnxFile,
OnnxGraph, OnnxNode, read_onnx), `onnx_graph` (AFFINE, Graph, GraphNode, build, layer_numbers, open_graph, read),
`options` (ModelConfig, TensorOptions, WarmUp, WarmUpInput, plain_name), `pbtxt_lines` (TextNode, read_lines),
`row_flow` (Proof, RowFlow, UNPROVED, prove_graph), `run_length` (varies), `runtime_parameters`, `signature`
(ModelSignature, TensorSpec), `triton_config` (BACKEND, GRAPH_LEVELS, PLATFORM).
"""
