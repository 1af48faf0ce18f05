"""The status page: what the server does now, for people. Framework-free: any HTTP server of ours can mount it.

Imports `repository`, `insight.graph_svg`, `security` and what is below them. Public are `asgi` (responder), `page`
(EventStream, StatusPage, StatusReply), `snapshot` (ProcessSample, ServerFacts, StatusSource), `wsgi` (Application,
mounted).
"""
