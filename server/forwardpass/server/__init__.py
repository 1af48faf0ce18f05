"""The process: every object wired, start, readiness, drain, signals, watchdog, the metrics port."""
