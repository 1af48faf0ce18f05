"""Shared by the commands: arguments, tables, array files, connection options.

Imports `client`, `protocol`, `optional_imports` and `errors`. Public are `arguments` (count, duration, rate, seconds),
`array_files` (plain), `connection_options`, `row_reader` (ArrayRows, CsvRows, NpyRows, READ_BYTES, RowSource, chunks),
`row_writer` (CsvFormat, NpyFormat, RowFormat, RowWriter), `table_files` (read_table), `tables` (count, shape, si,
table).
"""
