"""A server in a process of its own, for tests, demonstrations and load tests."""
