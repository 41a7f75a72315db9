"""Bars for what takes over a second, on stderr and only where somebody sees them; a script gets none."""

import contextlib
from collections.abc import Generator

from torpor.cli.printer import err
from torpor.snapshots.collect import Progress


@contextlib.contextmanager
def progress_bars() -> Generator[Progress]:
    """A function that may be told from any thread: what is done, how much of it, of how much."""
    if not err.is_terminal:
        yield lambda _what, _done, _of: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("[dim]torpor:[/dim] {task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield tell
