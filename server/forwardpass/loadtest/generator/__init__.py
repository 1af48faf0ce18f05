"""The load generator: processes that send requests on a schedule and record each response."""
