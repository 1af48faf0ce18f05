"""The `forwardpass` command and those of its subcommands that belong to no other package."""
