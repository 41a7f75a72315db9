"""The event log and the relational state of sessions, on SQLite. Knows rows and rules of writing, not sandboxes."""
