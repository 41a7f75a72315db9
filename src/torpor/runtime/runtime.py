"""The runtime's public verbs: create, run, resume, pull, diff, remove. One object a process; the CLI and the node use it."""
