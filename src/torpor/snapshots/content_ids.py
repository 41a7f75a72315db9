"""Names of contents under one tenant's key: equal bytes have equal names, and a name tells nothing of the bytes.

Why a page may be hashed behind a key, and why an object may not, is in docs/snapshot-format.md.
"""

import hmac
from hashlib import sha256

from torpor.snapshots.cipher import derive

PAGE_BYTES = 4096
PAGE_ID_BYTES = 16
OBJECT_ID_BYTES = 32
_BLOCK_BYTES = 64


class ContentIds:
    """Thread-safe: what is kept is only ever copied."""

    def __init__(self, secret: bytes) -> None:
        self._behind_key = sha256(derive(secret, "page ids", _BLOCK_BYTES))
        self._object_key = derive(secret, "object ids")

    def of_page(self, page: bytes | memoryview) -> bytes:
        return self.of_pages(memoryview(page))[0]

    def of_pages(self, pages: memoryview) -> list[bytes]:
        """The id of each page of many that lie back to back; the last one is padded with zeros."""
        begin, ids = self._behind_key.copy, list[bytes]()
        whole = len(pages) - len(pages) % PAGE_BYTES
        for at in range(0, whole, PAGE_BYTES):
            state = begin()
            state.update(pages[at : at + PAGE_BYTES])
            ids.append(state.digest()[:PAGE_ID_BYTES])
        if whole < len(pages):
            state = begin()
            state.update(bytes(pages[whole:]).ljust(PAGE_BYTES, b"\0"))
            ids.append(state.digest()[:PAGE_ID_BYTES])
        return ids

    def of_object(self, data: bytes | memoryview) -> bytes:
        return hmac.digest(self._object_key, data, "sha256")
