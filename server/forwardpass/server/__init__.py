"""The process: every object wired, start, readiness, drain, signals, watchdog, the metrics port.

Imports all that a server is made of; only `cli` imports it. Public are `server` (Server), `stop` (ignore_early).
"""
