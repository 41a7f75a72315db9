"""A session's lifecycle: joins log, store, sandbox and gateway in an order that survives a kill at any point."""
