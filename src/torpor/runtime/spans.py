"""A session as OpenTelemetry spans with the GenAI conventions: invoke_agent, below it chat, below that execute_tool.

The conventions are in development and their names move between packages, so the names stand here, and only those of the
present version are written. Contents (prompts, arguments, results) are left out unless they are asked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torpor.core.call import CallState
from torpor.core.errors import Damaged, MachineUnfit
from torpor.core.ids import SessionId
from torpor.db import calls, log, sessions
from torpor.db.database import Transaction
from torpor.gateway.transcript import Answered, Asked, read_answer, read_request
from torpor.runtime.turns import ToolUse, Turn, list_turns, read_turn

_PROVIDERS = {
    "anthropic": "anthropic",
    "openai_chat": "openai",
    "openai_responses": "openai",
    "gemini": "gcp.gemini",
}
_USAGE = {
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cache_read_input_tokens": "gen_ai.usage.cache_read.input_tokens",
    "cache_creation_input_tokens": "gen_ai.usage.cache_creation.input_tokens",
    "reasoning_output_tokens": "gen_ai.usage.reasoning.output_tokens",
}
_SETTINGS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
}

Attribute = str | int | float | Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanFacts:
    """One span with those below it; times in nanoseconds since 1970."""

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Attribute]
    client: bool = False
    error: str | None = None
    below: list["SpanFacts"] = field(default_factory=list["SpanFacts"])


def session_spans(tx: Transaction, session_id: SessionId, *, contents: bool) -> SpanFacts:
    """The session's span, with all others below it."""
    session = sessions.get(tx, session_id)
    events = log.events(tx, session_id)
    turns = list_turns(tx, session_id)
    name = session.name or str(session.spec.get("argv", ["agent"])[0])
    common: dict[str, Attribute] = {"gen_ai.conversation.id": session_id}
    return SpanFacts(
        name=f"invoke_agent {name}",
        start_ns=session.created_ns,
        end_ns=events[-1].wall_ns,
        attributes={
            **common,
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.id": session_id,
            "gen_ai.agent.name": name,
            "torpor.session.status": session.status.value,
        },
        error=session.status.value if session.exit_status else None,
        below=[
            span
            for turn, following in zip(turns, [*turns[1:], None], strict=True)
            for span in _turn_spans(tx, session_id, turn, following, common, contents=contents)
        ],
    )


def _turn_spans(
    tx: Transaction,
    session_id: SessionId,
    turn: Turn,
    following: Turn | None,
    common: Mapping[str, Attribute],
    *,
    contents: bool,
) -> Iterator[SpanFacts]:
    """The call, and the tools that ran between it and the next one: that they took no longer is all that is known."""
    asked, answered, first_ns = _said(tx, session_id, turn)
    end_ns = turn.wall_ns + (turn.thinking_ns or 0)
    model = turn.call.model or "unknown"
    attributes: dict[str, Attribute] = {
        **common,
        "gen_ai.operation.name": "generate_content" if turn.call.dialect == "gemini" else "chat",
        "gen_ai.provider.name": _PROVIDERS.get(turn.call.dialect, turn.call.dialect),
        "gen_ai.request.model": model,
        "torpor.call.id": turn.call.call_id,
        "torpor.turn": turn.number,
        "torpor.attempts": len(turn.call.attempts),
    }
    attributes |= {name: value for key, name in _USAGE.items() if isinstance(value := turn.call.usage.get(key), int)}
    attributes |= _asked_attributes(asked, answered)
    if turn.damage:
        attributes["torpor.damage"] = turn.damage
    if first_ns is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = first_ns / 1e9
    if contents:
        attributes["gen_ai.system_instructions"] = json.dumps([part.text for part in asked.system])
        attributes["gen_ai.input.messages"] = json.dumps([_plain(message) for message in asked.messages])
        attributes["gen_ai.output.messages"] = json.dumps([_plain(answered.message)])
    failed = turn.call.state is CallState.FAILED
    error = (turn.error or "failed").partition(":")[0] if failed else None
    if error:
        attributes["error.type"] = error
    yield SpanFacts(
        name=f"{attributes['gen_ai.operation.name']} {model}",
        start_ns=turn.wall_ns,
        end_ns=end_ns,
        attributes=attributes,
        client=True,
        error=error,
    )
    if following is not None:
        for tool in turn.tools:
            yield _tool_span(turn, tool, common, end_ns=end_ns, next_ns=following.wall_ns, contents=contents)


def _said(tx: Transaction, session_id: SessionId, turn: Turn) -> tuple[Asked, Answered, int | None]:
    """Request and answer of a turn, and when the answer began; nothing of one that is damaged."""
    try:
        content = read_turn(tx, session_id, turn.number)
        chunks = calls.load_chunks(tx, turn.call.call_id, len(turn.call.attempts)) if turn.call.attempts else []
    except Damaged:
        return read_request(turn.call.dialect, b""), read_answer(turn.call.dialect, b""), None
    return content.asked, content.answered, chunks[0].offset_ns if chunks else None


def _asked_attributes(asked: Asked, answered: Answered) -> dict[str, Attribute]:
    """What the request and the answer say of themselves."""
    attributes: dict[str, Attribute] = {}
    for key, attribute in _SETTINGS.items():
        value = asked.settings.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            attributes[attribute] = value
    if answered.model:
        attributes["gen_ai.response.model"] = str(answered.model)
    if answered.response_id:
        attributes["gen_ai.response.id"] = str(answered.response_id)
    if answered.finish_reason:
        attributes["gen_ai.response.finish_reasons"] = [str(answered.finish_reason)]
    return attributes


def _tool_span(
    turn: Turn, tool: ToolUse, common: Mapping[str, Attribute], *, end_ns: int, next_ns: int, contents: bool
) -> SpanFacts:
    about: dict[str, Attribute] = {
        **common,
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": tool.name,
        "torpor.turn": turn.number,
    }
    if tool.tool_id:
        about["gen_ai.tool.call.id"] = tool.tool_id
    if contents:
        about["gen_ai.tool.call.arguments"] = tool.arguments
        about["gen_ai.tool.call.result"] = tool.result or ""
    error = "tool_error" if tool.is_error else None
    if error:
        about["error.type"] = error
    name = f"execute_tool {tool.name}"
    return SpanFacts(name=name, start_ns=end_ns, end_ns=max(end_ns, next_ns), attributes=about, error=error)


def _plain(message: Any) -> dict[str, Any]:
    return {
        "role": message.role,
        "parts": [
            {"type": part.kind, "content": part.text, "id": part.tool_id, "name": part.name} for part in message.parts
        ],
    }


def send_spans(root: SpanFacts, *, endpoint: str | None, path: Path | None, version: str) -> int:
    """Send spans to an OTLP endpoint over HTTP, or write them to a file, one JSON object a line; returns how many.

    Raises:
        MachineUnfit: `otel_missing`; `otel_failed`, the endpoint did not take them.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    except ImportError as error:
        raise _otel_missing() from error
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource.create({"service.name": "torpor"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    _record(provider.get_tracer("torpor", version), root, None)
    spans = memory.get_finished_spans()
    if path is not None:
        path.write_text("".join(span.to_json(indent=None) + "\n" for span in spans))
        return len(spans)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise _otel_missing() from error
    exporter = OTLPSpanExporter(endpoint=endpoint)
    result = exporter.export(spans)
    exporter.shutdown()
    if result is not SpanExportResult.SUCCESS:
        raise MachineUnfit("otel_failed", f"cannot send spans to {endpoint}: it did not take them")
    return len(spans)


def _record(tracer: Any, facts: SpanFacts, context: Any) -> None:
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

    kind = SpanKind.CLIENT if facts.client else SpanKind.INTERNAL
    span = tracer.start_span(
        facts.name, context=context, kind=kind, attributes=dict(facts.attributes), start_time=facts.start_ns
    )
    for below in facts.below:
        _record(tracer, below, set_span_in_context(span))
    if facts.error:
        span.set_status(Status(StatusCode.ERROR, facts.error))
    span.end(end_time=facts.end_ns)


def _otel_missing() -> MachineUnfit:
    return MachineUnfit(
        "otel_missing", "cannot make spans: OpenTelemetry is not installed", hint="pip install 'torpor[otel]'"
    )
