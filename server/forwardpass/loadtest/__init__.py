"""Load tests: what to send, how fast, what came of it, and what a server needs for a load.

Imports `client`, `console`, `testing`, and of the server `model`, `repository.model_folder` and the transport's
HTTP/2. Nothing of it is for other packages.
"""
