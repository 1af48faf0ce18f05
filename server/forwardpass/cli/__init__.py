"""The `forwardpass` command and the subcommands that belong to no other package.

Imports everything; nothing imports it. Public are `main` (main).
"""
