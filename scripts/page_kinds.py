"""What kinds of pages differ between two memory images: `page_kinds.py EARLIER/pages.img LATER/pages.img`.

Without files it runs the small agent of bench-store twice and compares the first image of each; then one step of it.
Equal pages are those with equal bytes anywhere in the other image. Of the rest it says how many are equal once words
that look like addresses, or like hashes, are masked, and what they store: alone, and as deltas of the page in their
place.
"""

import os
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from itertools import pairwise
from pathlib import Path

import zstandard
from bench_images import agent_images

from torpor.config import torpor_home
from torpor.core.clock import SystemClock
from torpor.sandbox.tools import find_runsc
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.pack import Base, PackBuilder

PAGE_BYTES, PAGES_PER_FRAME = 4096, 256
HEAP_MB = 22
SHARES = (0.0, 0.01, 0.1, 0.2, 0.3, 0.5, 1.01)


def main() -> None:
    if len(sys.argv) == 3:
        compare(pages(Path(sys.argv[1])), pages(Path(sys.argv[2])))
        return
    runsc = find_runsc(torpor_home(os.environ) / "bin", os.environ, SystemClock()).path
    one, other = first_images(runsc, 1)[0], first_images(runsc, 2)
    print("two sessions of one command")
    compare(one, other[0])
    print("\none step of a session")
    compare(*other)


def first_images(runsc: Path, count: int) -> list[list[bytes]]:
    scratch = Path(tempfile.mkdtemp(prefix="page-kinds-", dir="/dev/shm"))
    try:
        with agent_images(runsc, scratch / "agent", HEAP_MB, count - 1) as images:
            return [pages(image / "pages.img") for image, _ in images]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def pages(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0") for at in range(0, len(data), PAGE_BYTES)]


def compare(before: list[bytes], after: list[bytes]) -> None:
    known = {page: number for number, page in reversed(list(enumerate(before)))}
    new = [number for number, page in enumerate(after) if page not in known]
    print(f"pages: {len(before)} and {len(after)}, equal {len(after) - len(new)}, new {len(new)}")
    masked, unhashed = ({mask(page, hashes=hashes) for page in before} for hashes in (False, True))
    by_address = {number for number in new if mask(after[number], hashes=False) in masked}
    by_hash = {number for number in new if mask(after[number], hashes=True) in unhashed} - by_address
    print(f"equal but for addresses: {len(by_address)}, but for addresses and hashes: {len(by_hash)} more")
    shares = Counter(share_of(sum(map(is_address, words(after[number]))) / 512) for number in new)
    for low, high in pairwise(SHARES):
        print(f"  {low:4.0%} to {min(high, 1):4.0%} of its words are addresses: {shares[low]}")
    alone, deltas = stored(before, after, known)
    print(f"stored alone {alone / 1e6:.2f} MB, as deltas {deltas / 1e6:.2f} MB")


def words(page: bytes) -> "array[int]":
    return array("Q", page)


def is_address(word: int) -> bool:
    return 1 << 40 <= word < 1 << 47


def is_hash(word: int) -> bool:
    top = word >> 56
    return top not in (0, 0xFF) and not all(32 <= byte < 127 or byte == 10 for byte in word.to_bytes(8, "little"))


def mask(page: bytes, *, hashes: bool) -> bytes:
    masked = array("Q")
    for word in words(page):
        if is_address(word):
            masked.append(1 << 63 | word & 0xFFF)
        else:
            masked.append(7 if hashes and is_hash(word) else word)
    return masked.tobytes()


def share_of(share: float) -> float:
    return max(low for low in SHARES if low <= share)


def stored(before: list[bytes], after: list[bytes], known: dict[bytes, int]) -> tuple[int, int]:
    """Bytes of the new pages, by themselves and against what the earlier image has in their place."""
    based: list[tuple[int, int]] = []
    at = 0
    for number, page in enumerate(after):
        at = known.get(page, at) + (page in known)
        if page not in known and at < len(before):
            based.append((number, at))
            at += 1
    builder, alone = PackBuilder(ContentIds(b"a measurement"), holds_pages=True, level=3), 0
    for start in range(0, len(based), PAGES_PER_FRAME):
        frame = based[start : start + PAGES_PER_FRAME]
        raw = b"".join(after[number] for number, _ in frame)
        base = Base([(b"\0" * 32, place) for _, place in frame], b"".join(before[place] for _, place in frame))
        builder.add_frame(raw, [b"\0" * 16] * len(frame), base=base)
        alone += len(zstandard.ZstdCompressor(level=3).compress(raw))
    return alone, builder.stored_bytes


if __name__ == "__main__":
    main()
