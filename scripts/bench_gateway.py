"""`make bench-gateway`: what Torpor's gateway adds to an answer, beside LiteLLM's proxy and no proxy, in one run.

Every chunk of the model's answer carries the instant of its writing, on the one clock of this machine, so what is
measured is the way of each chunk through the proxy and nothing else. Torpor is measured with everything on that it
promises: the relay, the FIFOs, every call and chunk in the log, synced where something depends on it. LiteLLM logs
nothing.
"""

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from bench_gateway_peers import Peer, peers
from rich.console import Console
from rich.table import Table

STAMP = re.compile(rb"t(\d+):(\d+)t")
T = TypeVar("T")
console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 16, 64], help="how many answers arrive at once")
    parser.add_argument("--rounds", type=int, default=3, help="how often each peer is measured, in turn")
    parser.add_argument("--chunks", type=int, default=40, help="chunks of an answer")
    parser.add_argument("--chunk-ms", type=float, default=25, help="time between two chunks")
    parser.add_argument("--seconds", type=float, default=4, help="how long requests are counted")
    parser.add_argument("--no-litellm", action="store_true", help="measure Torpor and no proxy alone")
    parser.add_argument("--json", action="store_true", help="print one object a line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torpor-bench-gateway-") as scratch:
        asyncio.run(run(options, Path(scratch)))


async def run(options: argparse.Namespace, scratch: Path) -> None:
    with_litellm = not options.no_litellm
    async with peers(scratch, chunks=options.chunks, chunk_ms=options.chunk_ms, with_litellm=with_litellm) as found:
        rows: list[dict[str, Any]] = []
        for streams in options.streams:
            measured = await in_turns(found, options.rounds, lambda peer, n=streams: latencies(peer, n))
            rows += [{"peer": peer.name, "streams": streams, **summary(measured[peer.name])} for peer in found]
        counted = await in_turns(found, options.rounds, lambda peer: requests_a_second(peer, options.seconds))
        for peer in found:
            figures = {"requests_a_second": statistics.median(counted[peer.name]), "memory_mb": peer.memory_mb()}
            rows.append({"peer": peer.name, **figures})
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        show(rows)


async def in_turns(found: list[Peer], rounds: int, measure: Callable[[Peer], Awaitable[T]]) -> dict[str, list[T]]:
    """Each peer once, then each again: a machine that gets busy is busy for all of them. The first turn warms up."""
    measured: dict[str, list[T]] = {peer.name: [] for peer in found}
    for turn in range(rounds + 1):
        for peer in found:
            result = await measure(peer)
            if turn:
                measured[peer.name].append(result)
    return measured


async def latencies(peer: Peer, streams: int) -> tuple[list[float], list[float]]:
    """Milliseconds on the way: of each request together with its first byte, and of each later chunk."""
    answers = await asyncio.gather(*(answer(peer, stream=True) for _ in range(streams)))
    firsts = [first for first, _ in answers]
    return firsts, [late for _, chunks in answers for late in chunks]


async def answer(peer: Peer, *, stream: bool) -> tuple[float, list[float]]:
    reader, writer = await asyncio.open_connection(peer.host, peer.port)
    body = json.dumps({"model": "bench", "stream": stream, "messages": [{"role": "user", "content": "go"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {peer.host}\r\nauthorization: Bearer any\r\n"
    head += f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    sent = time.monotonic_ns()
    writer.write(head.encode() + body)
    first, later, tail = 0.0, list[float](), b""
    seen = False
    while piece := await reader.read(65536):
        now = time.monotonic_ns()
        seen = True
        tail += piece
        last = 0
        for match in STAMP.finditer(tail):
            received, written = int(match[1]), int(match[2])
            if received:
                first = (now - sent - (written - received)) / 1e6
            else:
                later.append((now - written) / 1e6)
            last = match.end()
        tail = tail[last:][-64:]
    writer.close()
    if not seen or (stream and not (first and later)):
        raise SystemExit(f"bench: {peer.name} did not answer: {tail!r}")
    return first, later


async def requests_a_second(peer: Peer, seconds: float) -> float:
    """Small whole answers, sixteen clients at a time."""
    until = time.monotonic() + seconds
    done = 0

    async def client() -> None:
        nonlocal done
        while time.monotonic() < until:
            await answer(peer, stream=False)
            done += 1

    started = time.monotonic()
    async with asyncio.TaskGroup() as clients:
        for _ in range(16):
            clients.create_task(client())
    return done / (time.monotonic() - started)


def summary(measured: list[tuple[list[float], list[float]]]) -> dict[str, float]:
    firsts = [value for first, _ in measured for value in first]
    later = [value for _, chunks in measured for value in chunks]
    return {
        "first_p50_ms": statistics.median(firsts),
        "first_p99_ms": percentile(firsts, 0.99),
        "chunk_p50_ms": statistics.median(later),
        "chunk_p99_ms": percentile(later, 0.99),
    }


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="milliseconds on the way through (p50 / p99)")
    for column in ("peer", "streams", "request and first byte", "each later chunk"):
        table.add_column(column)
    for row in rows:
        if "streams" in row:
            first = f"{row['first_p50_ms']:.2f} / {row['first_p99_ms']:.2f}"
            chunk = f"{row['chunk_p50_ms']:.2f} / {row['chunk_p99_ms']:.2f}"
            table.add_row(row["peer"], str(row["streams"]), first, chunk)
    console.print(table)
    table = Table(title="small whole answers, 16 clients")
    for column in ("peer", "requests a second", "resident memory"):
        table.add_column(column)
    for row in rows:
        if "memory_mb" in row:
            memory = f"{row['memory_mb']:.0f} MB" if row["memory_mb"] else ""
            table.add_row(row["peer"], f"{row['requests_a_second']:.0f}", memory)
    console.print(table)


if __name__ == "__main__":
    main()
