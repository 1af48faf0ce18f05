"""What is counted and logged, and how it is read: metrics by model, of GPUs, and their export; limits on log lines.

Imports `errors`. Public are `catalogue` (Exporter, Scrape), `gpu` (GpuBatchRecord, GpuReader, RunKind), `log_limit`
(LogLimit), `model_metrics` (BatchRecord, ModelCounts, ModelMetrics).
"""
