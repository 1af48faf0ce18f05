"""Requests from bytes to bytes: decoded, admitted, queued, run in a batch, encoded.

Imports `transport.interface`, `execution`, `batching`, `model` and the layers below them. Public are `accounting`
(log_undecoded), `intake` (Intake), `load_waits` (LoadWaits), `request` (InferenceRequest), `request_traces`
(trace_undecoded), `shared_memory` (SharedMemoryRegions, SharedMemoryService), `tensor_contents` (ELEMENT_LIMIT),
`worker` (Worker).
"""
