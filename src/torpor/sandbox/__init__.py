"""Isolated machines, one technology a file, and the host end of the link into them. Knows no sessions, no database."""
