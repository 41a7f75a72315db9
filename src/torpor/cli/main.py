"""The `torpor` command's entry: collects the groups, and turns errors into one sentence, a hint and an exit status."""

import logging
import os
import sys
from typing import Annotated

import typer

from torpor import __version__
from torpor.cli import (
    copying,
    costs,
    inside,
    keys,
    lifecycle,
    machine,
    reading,
    running,
    search,
    transfer,
    trust,
    turns,
)
from torpor.cli.printer import err, print_error
from torpor.core.errors import TorporError, innermost

EXIT_STATUSES = """
Exit statuses: `run` and `resume` exit with the agent's own status, 79 if the session was stopped, 137 if it was killed.
Otherwise 0 done, 64 wrong input, 66 not found, 69 this machine lacks something, 70 a fault of Torpor,
71 the sandbox failed, 74 stored bytes are damaged, 75 a conflict (running already, ended), 76 an upstream failed,
130 interrupted.
"""

app = typer.Typer(
    name="torpor",
    help="Runs any AI agent as a durable session: kill -9 anything, `torpor resume`, and it goes on.",
    epilog=EXIT_STATUSES,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (running, inside, copying, reading, turns, search, costs, trust, transfer, lifecycle, keys, machine):
    group.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torpor {__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what Torpor does, on stderr.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    level = logging.DEBUG if verbose else logging.ERROR
    logging.basicConfig(level=level, format="torpor: %(name)s: %(message)s", stream=sys.stderr)


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="torpor")
    except* TorporError as errors:
        first = innermost(errors)
        assert isinstance(first, TorporError)
        print_error(first, as_json="--json" in sys.argv)
        sys.exit(first.exit_status)
    except* KeyboardInterrupt:
        sys.exit(130)
    except* BrokenPipeError:
        # `torpor log … | head`: nobody reads on. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except* OSError as errors:
        err.print(f"error machine_failed: {errors.exceptions[0]}", markup=False)
        sys.exit(70)
