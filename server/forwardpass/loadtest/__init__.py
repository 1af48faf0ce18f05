"""Load tests: requests, schedules, measurements, and the capacity that a load needs.

Imports `client`, `console`, `testing`, and of the server `model`, `repository.model_folder` and the transport's
HTTP/2. Public are `report.page` (page, section, table, text, tiles).
"""
