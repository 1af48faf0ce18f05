"""What the commands share: arguments, tables, array files, connection options."""
