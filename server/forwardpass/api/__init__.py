"""One handler for each RPC, whatever the transport: routing, health, metadata, statistics, settings, inference."""
