"""One server of several processes: a supervisor, and worker processes that are each a whole server behind its ports.

The supervisor owns the ports and the signals, and what must hold for all; it decodes no request and runs no network.
Imports `server` and what is below it; only `cli` imports it. Public are `process_count`, `supervisor` (Supervisor).
"""
