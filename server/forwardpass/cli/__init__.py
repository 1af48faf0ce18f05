"""The `forwardpass` command and those of its subcommands that belong to no other package.

Imports everything; nothing imports it. Public are `main` (main).
"""
