"""A server in a process of its own, for tests, demonstrations and load tests.

Imports `errors`. Public are `server_process` (ServerProcess).
"""
