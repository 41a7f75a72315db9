"""Pages that are written anew, one by one, into full packs: what repacking and laying out an image have in common."""

from torpor.core.crash import crash_point
from torpor.snapshots.backend import Backend
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.pack import PackBuilder, PackRef
from torpor.snapshots.pages import PAGES_PER_FRAME, PAGES_PER_PACK

_LEVEL = 3


class PagePacks:
    """Packs of pages in the order of `add`; durable once `finish` returns.

    Attributes:
        packs: those that are full, and after `finish` all.
    """

    def __init__(self, backend: Backend, ids: ContentIds) -> None:
        self._backend = backend
        self._ids = ids
        self._builder = self._new_builder()
        self._pages: list[bytes] = []
        self._page_ids: list[bytes] = []
        self.packs: list[PackRef] = []
        self.stored_bytes = 0

    def add(self, page: bytes, page_id: bytes) -> tuple[int, int]:
        """Where the page will be: the number of its pack, and which item of that."""
        place = len(self.packs), self._builder.items + len(self._pages)
        self._pages.append(page)
        self._page_ids.append(page_id)
        if len(self._pages) == PAGES_PER_FRAME:
            self.end_frame()
        return place

    def end_frame(self) -> None:
        """What is added from here on is read, and decompressed, apart from what was."""
        if self._pages:
            self._builder.add_frame(b"".join(self._pages), self._page_ids)
            self._pages, self._page_ids = [], []
        if self._builder.items >= PAGES_PER_PACK:
            self._close_pack()

    def finish(self) -> None:
        self.end_frame()
        self._close_pack()

    def _new_builder(self) -> PackBuilder:
        return PackBuilder(self._ids, holds_pages=True, level=_LEVEL)

    def _close_pack(self) -> None:
        if not self._builder.items:
            return
        index, data = self._builder.finish()
        self._builder = self._new_builder()
        if self._backend.put(index.ref.key, data):
            self.stored_bytes += len(data)
        self.packs.append(index.ref)
        crash_point("snapshot.pack_written")
