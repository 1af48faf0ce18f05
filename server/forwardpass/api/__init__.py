"""One handler for each RPC, whatever the transport: routing, health, metadata, statistics, settings, inference.

Imports `repository`, `inference`, `security`, `transport.interface` and what is below them. Public are `health`
(Health), `infer` (AsyncInference), `log_settings` (LogSettings), `model_statistics` (statistics),
`router` (Router, health_handlers), `service` (ControlService).
"""
