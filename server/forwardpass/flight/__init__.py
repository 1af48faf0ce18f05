"""Dumps of the flight recorder, read and drawn: a summary, a page with a timeline, a trace for Perfetto.

Reads files; never imported by serving. Imports `observability` for the format, `console`, and the page's frame from
`loadtest`. Public are `dump_file` (Dump), `summary` (as_text), `timeline_page` (as_html), `trace_events` (as_trace).
"""
