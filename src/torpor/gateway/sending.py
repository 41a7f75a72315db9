"""What a call sends: its request, with what Torpor adds to it, decided once before the sending is written down."""

from contextlib import suppress
from dataclasses import dataclass

from torpor.gateway.failure import NoAnswer
from torpor.gateway.intake import Intake
from torpor.gateway.routing import choose
from torpor.gateway.upstream import Outgoing, UpstreamClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """One request on its way upstream.

    Attributes:
        outgoing: as the agent made it, or with a note to it (`agent.told`).
        plain_body: the same without its content-encoding, as far as that is known.
        asking: the same as it is sent to learn what it costs, if its client does not ask for that; else None.
    """

    intake: Intake
    outgoing: Outgoing
    plain_body: bytes
    asking: Outgoing | None

    @property
    def usage_asked(self) -> bool:
        return self.asking is not None


def sending_of(intake: Intake, note: str | None, upstreams: UpstreamClient) -> Sending:
    noted = intake.outgoing_with(note) if note is not None else None
    outgoing = noted or intake.outgoing
    asking = None
    with suppress(NoAnswer):  # what no upstream takes fails when it is sent, and the log says that it was
        if upstreams.counts_when_asked(choose(intake.destination, outgoing.model)):
            asking = intake.asking_for_usage(outgoing)
    body = noted.body if noted is not None else intake.plain_body
    return Sending(intake=intake, outgoing=outgoing, plain_body=body, asking=asking)
