"""The server process: wiring, start, readiness, drain, signals, watchdog, the metrics port.

Imports everything a server is made of; only `cli` imports it. Public are `server` (Server), `stop` (ignore_early).
"""
