"""The `torpor` command: one file a command group, one printer for text and JSON."""
