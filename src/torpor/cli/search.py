"""`torpor search`: words in everything that is logged, best matches first."""

from typing import Annotated, Any

import typer
from rich.text import Text

from torpor.cli.printer import err, out, print_json, printable
from torpor.cli.reading import JSON, with_runtime
from torpor.runtime.runtime import Runtime
from torpor.runtime.search import MARK_END, MARK_START, Match, open_index


def register(app: typer.Typer) -> None:
    app.command("search")(search)


def search(
    words: Annotated[list[str], typer.Argument(metavar="WORDS", help="All of them; `word*` for a beginning.")],
    session: Annotated[str | None, typer.Option(help="Only in this session.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many matches.")] = 20,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Find words in what models saw and answered, in agents' output and in events.

    The first search of a long log takes a while: what is new is indexed then.
    """

    async def work(runtime: Runtime) -> list[Match]:
        found = None if session is None else (await runtime.session(session)).session_id
        async with open_index(runtime.home, runtime.database, runtime.clock) as index:
            return await index.find(words, session_id=found, limit=limit)

    matches = with_runtime(work)
    for match in matches:
        if json:
            print_json(_fields(match))
        else:
            _print(match)
    if not matches and not json:
        err.print("nothing found")


def _fields(match: Match) -> dict[str, Any]:
    return {
        "session": match.session_id,
        "seq": match.seq,
        "turn": match.turn,
        "source": match.source,
        "excerpt": match.excerpt.replace(MARK_START, "**").replace(MARK_END, "**"),
    }


def _print(match: Match) -> None:
    turn = "" if match.turn is None else f" turn {match.turn}"
    line = Text(f"{match.session_id}{turn} {match.source}  ", style="dim")
    for number, part in enumerate(match.excerpt.split(MARK_START)):
        found, _, rest = part.partition(MARK_END) if number else ("", "", part)
        line.append(printable(found), style="not dim bold yellow")
        line.append(printable(rest), style="not dim")
    out.print(line)
