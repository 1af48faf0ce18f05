"""Which requests make the next batch, and which are rejected. Pure policy: no I/O, no threads, no clock.

Imports `errors`, and nothing else. Public are `admission` (Admission), `batch_queue` (BatchQueue),
`rejections` (being_replaced, reject_late), `request` (Batch, Closed, LargeTurn, NEW, QueueLimits, QueueTimeout,
RUNNING, Request, SETTLED, Settled, WorkerOptions), `run_time_model` (RunTimeModel).
"""
