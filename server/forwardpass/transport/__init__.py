"""Connections, calls and statuses: bytes from the network come in, bytes go out. Independent of any model.

Imports `protocol`, `security`, `observability` and `errors`. Public are `addresses` (endpoint), `grpcio_server`
(GrpcioServer), `handed_listener` (HandedListener, PortCounts), `http2.client_connection` (ClientConnection, Ended,
framed, request_fields, timeout_field), `http2.limits` (Http2Limits), `http2.server` (Http2Server), `http2.sockets`,
`interface` (Answer, CallContext, Handler, KnowsOrigin, Metadata, Message, PendingRequest, ReplySink, Room), `listeners`
(ACCEPTS, ONE_CONNECTION, accepts), `memory_budget` (COUNTED_FROM, Holding, MemoryBudget, Share, no_room),
`rest.application` (RestApplication, RestLimits), `rest.call_context` (RestCallContext), `rest.server` (RestServer).
"""
