"""`python -m torpor.testing.simulator`: run random schedules, or one of them step by step."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torpor.core.clock import SystemClock
from torpor.testing.simulator.mutations import MUTATIONS
from torpor.testing.simulator.run import Report, run_in_workers, trace_of
from torpor.testing.simulator.witness import INVARIANTS

SHOWN_MAX = 5

EPILOG = """exit status: 0 every invariant held and was checked (with --break: the witness noticed),
1 otherwise, 64 wrong use"""


def main() -> int:
    options = _options()
    console = Console()
    if options.list:
        console.print(_mutations())
        return 0
    if options.trace is not None:
        return _trace(console, options.trace, options.broken)
    clock = SystemClock()
    started = clock.monotonic()
    report = _run(options, show_bar=console.is_terminal and not options.json)
    seconds = clock.monotonic() - started
    noticed = bool(report.violations)
    passed = noticed if options.broken else report.passed
    if options.json:
        sys.stdout.write(json.dumps(_as_json(report, seconds, passed=passed), indent=1) + "\n")
    else:
        _print(console, report, seconds, broken=options.broken)
    return 0 if passed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torpor.testing.simulator",
        description="Run the crash rules through random schedules, and judge them from outside.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--schedules", type=int, default=10_000, metavar="N", help="how many (default 10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed (default 0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--break", dest="broken", choices=sorted(MUTATIONS), metavar="NAME", help="break one rule")
    parser.add_argument("--trace", type=int, metavar="SEED", help="run one seed and tell every step")
    parser.add_argument("--list", action="store_true", help="list the rules that can be broken")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args()


def _run(options: argparse.Namespace, *, show_bar: bool) -> Report:
    total = Report()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show_bar, transient=True) as progress:
        bar = progress.add_task("schedules", total=options.schedules)
        for piece in run_in_workers(options.seed, options.schedules, broken=options.broken, workers=options.workers):
            total.add(piece)
            progress.advance(bar, piece.schedules)
    return total


def _trace(console: Console, seed: int, broken: str | None) -> int:
    lines, violation = trace_of(seed, broken)
    for line in lines:
        sys.stdout.write(line + "\n")
    console.print(f"[red]{violation}[/]" if violation is not None else "every invariant held", highlight=False)
    return 1 if violation is not None else 0


def _print(console: Console, report: Report, seconds: float, *, broken: str | None) -> None:
    rate = report.schedules / max(seconds, 1e-9)
    console.print(f"{report.schedules} schedules, {report.steps} steps, {seconds:.1f} s, {rate:.0f} schedules/s")
    happened = Table("what happened", "times", box=None, pad_edge=False)
    for name, times in sorted(report.happened.items()):
        happened.add_row(name, str(times))
    console.print(happened)
    checks = Table("invariant", "checked", "violated", "", box=None, pad_edge=False)
    for number, text in INVARIANTS.items():
        violated = sum(invariant == number for _, invariant, _ in report.violations)
        checks.add_row(str(number), str(report.checked[number]), str(violated), text)
    console.print(checks)
    for seed, _, text in report.violations[:SHOWN_MAX]:
        console.print(f"seed {seed}: {text}", highlight=False)
    if report.never_checked:
        console.print(f"[red]never checked:[/] {report.never_checked}; run more schedules")
    if broken is not None:
        verdict = f"noticed in {len(report.violations)} schedules" if report.violations else "[red]not noticed[/]"
        console.print(f"{broken} ({MUTATIONS[broken].breaks}): {verdict}")


def _mutations() -> Table:
    table = Table("name", "RECOVERY", "what is broken", box=None, pad_edge=False)
    for name, mutation in MUTATIONS.items():
        table.add_row(name, mutation.section, mutation.breaks)
    return table


def _as_json(report: Report, seconds: float, *, passed: bool) -> dict[str, object]:
    return {
        "passed": passed,
        "schedules": report.schedules,
        "steps": report.steps,
        "seconds": round(seconds, 3),
        "schedules_per_second": round(report.schedules / max(seconds, 1e-9), 1),
        "happened": dict(sorted(report.happened.items())),
        "checked": {str(number): report.checked[number] for number in INVARIANTS},
        "never_checked": report.never_checked,
        "violations": [{"seed": seed, "invariant": n, "text": text} for seed, n, text in report.violations],
    }


if __name__ == "__main__":
    sys.exit(main())
