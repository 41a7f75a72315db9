"""How much memory a sandbox may take, from where on it is parked, and where the kernel kills it. Pure."""

from torpor.core.errors import InvalidInput

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
BYTES_MIN = 64 << 20
"""Less than an interpreter and its libraries need is a mistake."""
MARK_PERCENT = 90
"""Of the limit: what is left is for what the agent takes until it stands still."""

HEADROOM_BYTES_MIN = 64 << 20
HEADROOM_PERCENT = 12


def parse_memory(text: str) -> int:
    """Bytes, of `2G`, `512M` or a number of bytes.

    Raises:
        InvalidInput: `memory_malformed`.
    """
    number, unit = (text[:-1], UNITS[text[-1:].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    if not (number.isascii() and number.isdigit() and len(number) <= 18) or int(number) * unit < BYTES_MIN:
        raise InvalidInput(
            "memory_malformed",
            f"cannot read --memory {text!r}: it is no size of at least {BYTES_MIN >> 20}M",
            hint="Say 512M, 2G or a number of bytes.",
        )
    return int(number) * unit


def mark_of(limit_bytes: int) -> int:
    """From so many bytes on the session is parked."""
    return limit_bytes * MARK_PERCENT // 100


def wall_of(limit_bytes: int) -> int:
    """With more than that it is killed: behind the limit there is room for what its own kernel needs meanwhile."""
    return limit_bytes + max(HEADROOM_BYTES_MIN, limit_bytes * HEADROOM_PERCENT // 100)


def told(size_bytes: int) -> str:
    """For people: whole mebibytes."""
    return f"{size_bytes >> 20} MiB"
