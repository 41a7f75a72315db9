"""Keeps the real key out of what is logged and delivered when an upstream echoes it.

The key's place is taken by as many `*`, so that no length changes. A key that is split between two pieces is found all
the same: a piece's end that may be the key's beginning waits for the next piece.
"""

SECRET_BYTES_MIN = 12
"""A shorter key ("ollama", "EMPTY") is no secret, and its letters stand in honest answers."""


class Scrubber:
    """One stream of bytes; feed pieces in order, `rest` at the end."""

    def __init__(self, key: str | None) -> None:
        secret = (key or "").encode()
        self._secret = secret if len(secret) >= SECRET_BYTES_MIN else b""
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may go on."""
        if not self._secret:
            return data
        data = (self._held + data).replace(self._secret, b"*" * len(self._secret))
        held = self._possible_beginning(data)
        self._held = data[len(data) - held :]
        return data[: len(data) - held]

    def rest(self) -> bytes:
        held, self._held = self._held, b""
        return held

    def text(self, text: str) -> str:
        """A whole string of its own, such as a header's value."""
        return text.replace(self._secret.decode(), "*" * len(self._secret)) if self._secret else text

    def _possible_beginning(self, data: bytes) -> int:
        """How many bytes at the end may be the first ones of the key."""
        for length in range(min(len(self._secret) - 1, len(data)), 0, -1):
            if data.endswith(self._secret[:length]):
                return length
        return 0
