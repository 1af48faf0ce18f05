"""A request's way from bytes to bytes: decoded, admitted, queued, run in a batch, encoded."""
