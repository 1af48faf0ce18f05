"""Which requests make the next batch, and which are rejected. Pure policy: no I/O, no threads, no clock."""
