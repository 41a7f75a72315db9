"""Gets the answer of one call that is in the log and was never sent, for a session that no sandbox lives of.

The answer is written as any is. Whoever restores the session delivers it from the log.
"""

import asyncio
from collections.abc import Callable, Sequence

from torpor.config import PriceRule, Upstream
from torpor.core.call import Call
from torpor.core.checkpoint import Checkpoint
from torpor.core.clock import Clock
from torpor.core.ids import CallId, SessionId
from torpor.db.database import Database
from torpor.gateway.billing import Billing
from torpor.gateway.prices import PriceBook
from torpor.gateway.pumps import FirstByteAt, Pumps
from torpor.gateway.record import Recorder
from torpor.gateway.routing import Routing
from torpor.gateway.upstream import UpstreamClient
from torpor.gateway.waits import Waits


async def fetch_answer(
    call_id: CallId,
    *,
    database: Database,
    session_id: SessionId,
    owner_token: int,
    clock: Clock,
    upstreams: Sequence[Upstream],
    prices: Sequence[PriceRule],
    on_wait: Callable[[str], None],
) -> None:
    """Send a model's call and wait until its answer, or why there is none, is in the log.

    Raises:
        Superseded: another node took the session.
    """
    recorder = Recorder(database=database, session_id=session_id, owner_token=owner_token, clock=clock)
    routing = Routing(upstreams)
    pumps = Pumps(
        recorder=recorder,
        upstreams=UpstreamClient(clock),
        billing=Billing(recorder=recorder, book=PriceBook(prices), routing=routing),
        routing=routing,
        on_call=_on_call,
        on_failed=lambda _: None,
        waits=Waits(recorder, on_wait),
        checkpoint_for=_no_checkpoint,
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(pumps.run())
        await pumps.ready()
        answer = await pumps.revive(call_id, announce=False)
        if answer is not None:
            await answer.recording.wait_end()
        pumps.close()
        await running


async def _on_call(_call_id: CallId, _first_byte_at: FirstByteAt) -> None:
    return


async def _no_checkpoint(_call: Call) -> Checkpoint | None:
    return None
