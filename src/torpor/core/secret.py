"""A key as a value: what prints, formats or logs it by mistake shows nothing."""


class Secret(str):
    """A key: a string that shows itself only to those who ask for `reveal`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret(...)"

    def __str__(self) -> str:
        return "[secret]"

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    def reveal(self) -> str:
        return super().__str__()
