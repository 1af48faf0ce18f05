"""The server process: wiring, start, readiness, drain, signals, watchdog, the metrics port.

Imports everything a server is made of; only `cli` and `processes` import it. Public are `endpoints` (bind,
serves_http), `metrics_port` (MetricsPort, PATH), `process_group` (GroupMember, Methods), `server` (Server), `stop`
(Stop, ignore_early, signals).
"""
