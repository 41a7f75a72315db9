"""The host's HTTP side of a session: model dialects, the log of every call, and delivery from that log.

`server.Gateway` is what the runtime uses. Bytes pass unchanged; keys are added on the way out and never come back in.
"""
