"""Load tests: what to send, how fast, what came of it, and what a server needs for a load."""
