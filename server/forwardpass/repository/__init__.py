"""Which models there are, and bringing them up: found on disk, loaded, measured, probed, served, unloaded."""
