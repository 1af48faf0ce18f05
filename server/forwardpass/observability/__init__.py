"""Metrics and logging: metrics of models and of GPUs, and their export; limits on repeated log lines.

Imports `errors`. Public are `catalogue` (Exporter, Scrape), `gpu` (GpuBatchRecord, GpuReader, RunKind), `log_limit`
(LogLimit), `model_metrics` (BatchRecord, LATENCY_BOUNDS, ModelCounts, ModelMetrics, ModelTotals, STAGES),
`recent_errors` (RecentError, RecentErrors).
"""
