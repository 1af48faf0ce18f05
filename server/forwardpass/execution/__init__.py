"""Opens and runs networks with an execution provider. The only package that imports onnxruntime.

Imports `model`, `protocol` and `observability`. Public are `bound_row` (bind), `cpu_budget` (CpuBudget), `cuda.detect`
(driver), `interruption` (Interruption), `memory_limit` (memory_limit), `onnx_runtime` (ort), `ort_session`
(OrtSession, new_run_options, read_signature, reason, set_memory, share_threads), `placement` (CPU, Devices,
Placement), `providers` (OpenSession, available, open_session, place), `reshaped_session` (ReshapedSession,
in_client_shape), `session` (Runnable, Session, Task), `shared_arena`, `shared_weights` (SharedWeights,
temporary_folder), `stacking` (Buffer, check_elements, raw, stack, stack_into).
"""
