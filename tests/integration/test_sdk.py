"""`torpor.agent` with the real gateway: each function is a call in the log, and a cut connection is asked anew."""

import ast
import asyncio
import json
import sys
from pathlib import Path

import pytest
from tests.integration.gateway_stage import Node, Stage, gateway_stage
from tests.integration.test_agent_api import checkpoint_of
from tests.integration.test_gateway_budget import run_session
from tests.integration.test_gateway_restart import redo_everything
from tests.integration.test_waits import answer, deliver, whole

import torpor.agent
import torpor.sdk.agent
from torpor.core.events import Kind
from torpor.core.ids import NodeId, SessionId
from torpor.core.session import SessionStatus
from torpor.core.waitpoint import told_file
from torpor.db import sessions
from torpor.db.database import Transaction
from torpor.runtime.home import SDK_DIRECTORY, install_sdk

SOURCE = Path(torpor.sdk.agent.__file__)
OLDEST = [str(python) for python in Path(sys.base_prefix).parent.glob("3.8.*/bin/python3")] or ["/usr/bin/python3"]
"""Python 3.8, where several versions lie beside each other."""


async def start(stage: Stage, program: str, python: str = sys.executable) -> asyncio.subprocess.Process:
    """A program that finds the SDK as it does in a sandbox: without Torpor, in a directory that init's holds."""
    install_sdk(stage.directory)
    environment = {
        **stage.environment,
        "TORPOR_URL": stage.url,
        "PYTHONPATH": str(stage.directory / SDK_DIRECTORY),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    head = "import sys; assert not any('site-packages' in path for path in sys.path)\nfrom torpor import agent\n"
    return await asyncio.create_subprocess_exec(
        *(python, "-S", "-c", head + program), stdout=asyncio.subprocess.PIPE, env=environment
    )


async def end(process: asyncio.subprocess.Process) -> str:
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


PROGRAM = """
print(agent.session()["incarnation"], agent.checkpoint(), agent.send("out"))
assert agent.context()["request"] is None
print(agent.ask("Deploy?", ["yes", "no"]), agent.receive(timeout=999).text, agent.receive(timeout=0))
agent.sleep(0.01)
try:
    agent.ask("")
except agent.Refused as refused:
    print(refused.code, refused.status)
"""
ASYNC_PROGRAM = """
import asyncio

async def main():
    aio = agent.aio
    print((await aio.session())["incarnation"], await aio.checkpoint(), await aio.send("out"))
    assert (await aio.context())["request"] is None
    print(await aio.ask("Deploy?", ["yes", "no"]), (await aio.receive(timeout=999)).text, await aio.receive(timeout=0))
    await aio.sleep(0.01)
    try:
        await aio.ask("")
    except agent.Refused as refused:
        print(refused.code, refused.status)

asyncio.run(main())
"""


@pytest.mark.parametrize("python", [*OLDEST, sys.executable])
@pytest.mark.parametrize("program", [PROGRAM, ASYNC_PROGRAM], ids=["sync", "async"])
async def test_every_function_does_what_its_route_does(tmp_path: Path, program: str, python: str) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.checkpoint_for.outcome = checkpoint_of(stage)
        await run_session(node)
        process = await start(stage, program, python)
        await node.logged(Kind.WAITPOINT_CREATED)
        await answer(node, "YES")
        await deliver(node, "in")
        assert await end(process) == "1 3 1\nyes in None\nrequest_invalid 400\n"
        await whole(node)


SPAWNING = """
child = agent.spawn(["true"], name="kid")
print(agent.wait(child, timeout=0), agent.wait(child))
"""
ASYNC_SPAWNING = """
import asyncio

async def main():
    child = await agent.aio.spawn(["true"], name="kid")
    print(await agent.aio.wait(child, timeout=0), await agent.aio.wait(child))

asyncio.run(main())
"""


@pytest.mark.parametrize("program", [SPAWNING, ASYNC_SPAWNING], ids=["sync", "async"])
async def test_a_childs_end_is_told(tmp_path: Path, program: str) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.checkpoint_for.outcome = checkpoint_of(stage)
        await run_session(node)
        process = await start(stage, program)
        await node.logged(Kind.CALL_INTENDED, 3)
        child = await node.database.read(lambda tx: sessions.find(tx, "kid"))
        await end_session(node, child.session_id)
        assert await end(process) == "None Ended(status='failed', exit_status=7)\n"
        await whole(node)


async def end_session(node: Node, child_id: SessionId) -> None:
    """As the child's own node does."""

    def work(tx: Transaction) -> None:
        token = sessions.acquire(
            tx, session_id=child_id, seen_token=0, node_id=NodeId("node_other"), boot_id="boot", pid=2, wall_ns=1
        )
        owner = {"session_id": child_id, "owner_token": token}
        sessions.set_status(tx, **owner, status=SessionStatus.RUNNING, wall_ns=1)
        sessions.set_status(tx, **owner, status=SessionStatus.FAILED, exit_status=7, wall_ns=1)

    await node.database.write(work, durable=True)


@pytest.mark.parametrize("python", [*OLDEST, sys.executable])
async def test_files_that_come_with_an_answer_are_bytes_by_their_names(tmp_path: Path, python: str) -> None:
    said = 'said = agent.ask("Good?", files=["report.pdf"])\nprint(said, said == "yes", sorted(said.files.items()))'
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        await run_session(node)
        process = await start(stage, said, python)
        await node.logged(Kind.WAITPOINT_CREATED)
        await answer(node, "yes", told_file("b.png", b"\xff\0"), told_file("a.md", b"text"))
        assert await end(process) == "yes True [('a.md', b'text'), ('b.png', b'\\xff\\x00')]\n"


EFFECT = """
ran = []
def step(number):
    ran.append(number)
    return {"ran": (number,)}
print(agent.effect("charge [1]", step, 7), agent.effect("charge [1]", step, 8), agent.effect("other", str), ran)
"""


async def test_a_step_runs_once_for_its_name_and_its_first_result_counts(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            assert await end(await start(stage, EFFECT)) == "{'ran': [7]} {'ran': [7]}  [7]\n"
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            # It was taken back to before the first of them: nothing runs, and it takes the path of the log.
            assert await end(await start(stage, EFFECT)) == "{'ran': [7]} {'ran': [7]}  []\n"
            assert node.gateway.pending_redo() == ()
            assert await node.events(Kind.CALL_DIVERGED) == []
            await whole(node)


async def test_two_who_record_a_result_at_once_get_the_same(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        racing = "print(agent.effect('one', __import__('os').getpid))"
        first, second = [await start(stage, racing) for _ in range(2)]
        assert await end(first) == await end(second)


async def test_a_wait_whose_connection_is_reset_is_asked_anew_and_joined(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            await run_session(node)
            process = await start(stage, "print(agent.ask('Go on?'))")
            await node.logged(Kind.WAITPOINT_CREATED)
            redo = await redo_everything(node)
        stage.reboot()  # The client's connection ends with a reset, and its program is in no image.
        async with stage.node(incarnation=2, redo=redo) as node:
            await node.logged(Kind.CALL_REPEATED)
            await answer(node, "on")
            assert await end(process) == "on\n"
            assert len(await node.events(Kind.WAITPOINT_CREATED)) == 1


async def test_outside_of_a_session_it_says_so(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        stage.process.kill()
        stage.process.wait()
        for asks in ("agent.session()", "agent.after_restore(print)", "__import__('asyncio').run(agent.aio.session())"):
            program = (
                f"try:\n    {asks}\nexcept agent.Unreachable as error:\n    print('session of Torpor' in str(error))"
            )
            assert await end(await start(stage, program)) == "True\n"


def test_it_is_one_file_for_old_pythons_and_imports_little() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 8))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= sys.stdlib_module_names
    at_once = {
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert at_once == {"__future__", "json", "os", "socket", "sys", "threading", "time", "typing"}


def test_where_torpor_is_installed_it_has_the_same_name() -> None:
    assert {name: getattr(torpor.agent, name) for name in torpor.agent.__all__} == {
        name: getattr(torpor.sdk.agent, name) for name in torpor.sdk.agent.__all__
    }


def test_a_newer_version_replaces_the_file_as_a_whole(tmp_path: Path) -> None:
    install_sdk(tmp_path)
    [installed] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert installed.read_bytes() == SOURCE.read_bytes()
    assert not (installed.parent / "__init__.py").exists()
    installed.write_text("old")
    install_sdk(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [installed]
    assert json.dumps(installed.read_text()) == json.dumps(SOURCE.read_text())
