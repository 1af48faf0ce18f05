"""Shared by the commands: arguments, tables, array files, connection options.

Imports `client`, `protocol` and `errors`. Public are `arguments` (count, duration, rate, seconds), `array_files`
(plain), `connection_options`, `row_reader` (CsvRows, NpyRows, READ_BYTES, RowSource, chunks), `row_writer` (CsvFormat,
NpyFormat, RowFormat, RowWriter), `tables` (count, shape, si, table).
"""
