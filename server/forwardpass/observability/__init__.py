"""Metrics, logging and the flight recorder: metrics of models and of GPUs, and their export; limits on repeated log
lines; the last batches, packed; traces, by OpenTelemetry.

Imports `errors`. Public are `access_log` (AccessEntry, AccessLog, Origin), `catalogue` (Exporter, METRICS, Metric,
READY, SampleSink), `exposition` (Exposition), `flight_record` (KEPT_ID, KEPT_REQUESTS, Outcome, RECEIVER, pack,
pack_single), `flight_recorder` (FORMAT, FORMAT_VERSION, FlightRecorder, FlightTrack), `gpu` (GpuBatchRecord, GpuReader,
RunKind), `histogram` (Exemplar, Histogram), `latency_watch` (LatencyCondition, LatencyWatch), `log_limit` (LogLimit),
`log_lines` (emit, fields, set_up), `model_metrics` (BatchRecord, LATENCY_BOUNDS, ModelCounts, ModelMetrics,
ModelTotals, STAGES), `recent_errors` (RecentError, RecentErrors), `trace_context` (Sampled), `tracing` (TracedBatch,
TracedRequest, TracedRun, Tracing, open_tracing).
"""
