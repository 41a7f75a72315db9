"""Kinds of rows, as plain strings, and members of core's enums, as plain names.

Looking a member up on its class costs ten times as much as a name of a module, and the simulator does it all the time.
"""

from torpor.core.call import CallState
from torpor.core.events import Kind
from torpor.core.session import SessionStatus

AGENT_EXITED = Kind.AGENT_EXITED.value
BUDGET_CHANGED = Kind.BUDGET_CHANGED.value
CALL_COMPLETED = Kind.CALL_COMPLETED.value
CALL_DELIVERED = Kind.CALL_DELIVERED.value
CALL_DIVERGED = Kind.CALL_DIVERGED.value
CALL_FAILED = Kind.CALL_FAILED.value
CALL_INTENDED = Kind.CALL_INTENDED.value
CALL_REPEATED = Kind.CALL_REPEATED.value
CALL_RETRIED = Kind.CALL_RETRIED.value
CALL_SENT = Kind.CALL_SENT.value
CALL_TORN = Kind.CALL_TORN.value
CALL_UNKNOWN = Kind.CALL_UNKNOWN.value
CHECKPOINT_COMMITTED = Kind.CHECKPOINT_COMMITTED.value
INCARNATION_STARTED = Kind.INCARNATION_STARTED.value
LEASE_ACQUIRED = Kind.LEASE_ACQUIRED.value
OUTPUT_DIFFERED = Kind.OUTPUT_DIFFERED.value
RECOVERY_REJECTED = Kind.RECOVERY_REJECTED.value
SESSION_CREATED = Kind.SESSION_CREATED.value
SESSION_REWOUND = Kind.SESSION_REWOUND.value
SESSION_STATUS = Kind.SESSION_STATUS.value
STREAM_RESET = Kind.STREAM_RESET.value
WAITPOINT_CREATED = Kind.WAITPOINT_CREATED.value
WAITPOINT_RESOLVED = Kind.WAITPOINT_RESOLVED.value

# Rows that are no events: pieces of answers and of output, which the log refers to.
HEAD, CHUNK, OUTPUT = "head", "chunk", "output"
NO_EVENTS = frozenset({HEAD, CHUNK, OUTPUT})

SENT, ANSWERED, FAILED = CallState.SENT, CallState.ANSWERED, CallState.FAILED
UNKNOWN = CallState.UNKNOWN
RUNNING, WAKING, ASLEEP = SessionStatus.RUNNING, SessionStatus.WAKING, SessionStatus.ASLEEP
WAITING = SessionStatus.WAITING
