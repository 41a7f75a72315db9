"""What each client makes of each fault of the provider, behind the gateway: never an answer that only looks whole.

A fault strikes once, or every time. The table of what happened is printed, and written where --matrix-table says.
"""

import asyncio
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.clients.npm import NotInstallable
from tests.integration.gateway_stage import Node, Stage, gateway_stage
from tests.matrix.clients import CLIENTS, Client, Started

from torpor.core.events import Kind
from torpor.testing.model_faults import Fault, FaultRule
from torpor.testing.model_scripts import Answer, Conversation, Pace, Say, Try

CLIENT_SECONDS = 150
SILENT_SECONDS = 2.0
"""How long the gateway waits for a provider that says nothing."""
RETRIES = 1
TEXT = "These are my words, in small pieces, so that an answer has a middle, and this is their end."

FAULTS: dict[str, FaultRule | Pace] = {
    "none": Pace(),
    "drop before head": FaultRule(fault=Fault.DROP),
    "reset before head": FaultRule(fault=Fault.RESET_BEFORE_HEAD),
    "reset after head": FaultRule(fault=Fault.RESET_AFTER_HEAD),
    "reset mid": FaultRule(fault=Fault.RESET_MID),
    "clean cut mid": FaultRule(fault=Fault.CUT_MID),
    "500": FaultRule(fault=Fault.STATUS_500),
    "429": FaultRule(fault=Fault.STATUS_429),
    "529": FaultRule(fault=Fault.STATUS_529),
    "in-band error": FaultRule(fault=Fault.ERROR_EVENT),
    "silent for good": FaultRule(fault=Fault.SILENT),
    "silent for a while": Pace(first_byte_seconds=SILENT_SECONDS / 2),
    "slow": Pace(chunk_seconds=0.15),
}
ALWAYS = ("drop before head", "reset mid", "clean cut mid", "500")
"""What also strikes every time; with more of them the run would be one of waiting for back-offs."""
CASES = [
    *((name, 1) for name in FAULTS),
    *((name, None) for name in ALWAYS),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What happened in one cell of the matrix."""

    client: str
    fault: str
    requests: int
    upstream: int
    answered: int
    outcome: str
    seconds: float


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    lines = [
        "| client | fault of the provider | requests of the client | sent to the provider | answered | the client |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = (row.client, row.fault, row.requests, row.upstream, row.answered, row.outcome)
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    text = "\n".join(lines)
    print(f"\n{text}")
    if wanted := request.config.getoption("--matrix-table"):
        Path(wanted).write_text(f"{text}\n")


@pytest.mark.npm
@pytest.mark.timeout(CLIENT_SECONDS + 30)
@pytest.mark.parametrize(("fault", "times"), CASES, ids=[f"{name}-{times or 'always'}" for name, times in CASES])
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
async def test_a_fault_is_never_a_whole_answer(
    client: Client, fault: str, times: int | None, tmp_path: Path, scratch: Path, table: list[Row]
) -> None:
    if times is None and client.name == "claude-code":
        pytest.skip("it tries for minutes: at least eight times in 67 seconds")
    kind = FAULTS[fault]
    said: list[str] = []

    def script(conversation: Conversation, this: Try) -> Answer:
        said.append(f"{TEXT} ({this.nonce})")
        return Answer(parts=(Say(text=said[-1]),), pace=kind if isinstance(kind, Pace) else Pace())

    async with (
        gateway_stage(tmp_path, script=script, read_seconds=SILENT_SECONDS, retries=RETRIES) as stage,
        stage.node() as node,
    ):
        if isinstance(kind, FaultRule):
            stage.model.faults.add(FaultRule(fault=kind.fault, times=times))
        try:
            started = client.start(stage.url)
        except NotInstallable as error:
            pytest.skip(str(error))
        before = time.monotonic()
        status, output, errors = await run(started, stage, scratch)
        seconds = time.monotonic() - before
        row = await row_of(
            client, f"{fault}, {'once' if times else 'always'}", stage, node, (status, output, errors), seconds
        )
        table.append(row)
        check(client, row, stage, status, output, said)
        if isinstance(kind, Pace):
            assert (status, row.upstream) == (0, 1), errors


async def run(started: Started, stage: Stage, scratch: Path) -> tuple[int, str, str]:
    """Run a client to its end beside the gateway; gives its exit status and what it wrote."""
    for file in started.files:
        shutil.copy(file, scratch)
    variables = {**started.variables, "HOME": str(scratch), "TMPDIR": str(scratch)}
    process = await asyncio.create_subprocess_exec(
        *started.command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**stage.environment, **variables},
        cwd=scratch,
    )
    try:
        async with asyncio.timeout(CLIENT_SECONDS):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def row_of(
    client: Client, fault: str, stage: Stage, node: Node, ended: tuple[int, str, str], seconds: float
) -> Row:
    status, output, errors = ended
    await every_answer_ended(stage)
    kinds = Counter(event.kind for event in await node.events())
    whole = [line for line in stage.model.witness.lines if line.get("outcome") in ("complete", "slow")]
    return Row(
        client=client.name,
        fault=fault,
        requests=kinds[Kind.CALL_INTENDED] + kinds[Kind.CALL_JOINED],
        upstream=stage.model.witness.requests,
        answered=len(whole),
        outcome="has the answer" if status == 0 else f"fails: {reason(output, errors)}",
        seconds=seconds,
    )


async def every_answer_ended(stage: Stage) -> None:
    """A client may leave at the last event of an answer, before its connection ends: wait for the witness's line."""
    async with asyncio.timeout(CLIENT_SECONDS):
        while any(
            one["outcome"] == "open" for request in stage.model.witness.report()["requests"] for one in request["tries"]
        ):
            await asyncio.sleep(0.01)


def reason(output: str, errors: str) -> str:
    """The name of the exception that a client ended with, or what else it wrote last."""
    # Codex ends with its own error as an event, and tells on stderr that nobody types.
    failed = re.search(r'"type":"turn.failed","error":{"message":"([^"]*)', output)
    last = failed[1] if failed else (errors.strip().splitlines() or ["without a word"])[-1]
    name = last.partition(":")[0].rpartition(".")[2]
    return name if name.isidentifier() else last.replace("|", "/")[:80]


def check(client: Client, row: Row, stage: Stage, status: int, output: str, said: list[str]) -> None:
    """Success means that one whole answer was asked for and is shown; a failure, that none was."""
    if status == 0:
        assert client.texts(output)[-1:] == said[-1:], (row, output)
        assert row.answered == 1, row
        return
    assert row.answered == 0, (row, output)
    assert not any(words in output for words in said), (row, output)
