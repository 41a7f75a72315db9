"""The requests of a synthetic coding agent, turn by turn, in the shape and size that Claude Code's have.

A fixed part (system prompt and tools) stands before a conversation that grows with every turn, and the cache marker
moves to the last message each time. Bodies are a pure function of the turn and the seed; nothing here is random twice.
"""

import json
import random
from typing import Any

from torpor.core.call import ResponseHead
from torpor.db.requests import RequestHead

FIXED_BYTES = 113_000
TURN_BYTES = 3_000
TOOLS = 24
REQUEST_HEAD = RequestHead(
    method="POST",
    target="/v1/messages?beta=true",
    headers=(
        ("Accept", "application/json"),
        ("Content-Type", "application/json"),
        ("User-Agent", "claude-cli/2.1.197 (external, sdk-cli)"),
        ("X-Claude-Code-Session-Id", "0c7d8a52-3a48-4c6d-9e0b-0b6f6d1f2a11"),
        ("X-Stainless-Arch", "x64"),
        ("X-Stainless-Lang", "js"),
        ("X-Stainless-OS", "Linux"),
        ("X-Stainless-Package-Version", "0.74.0"),
        ("X-Stainless-Retry-Count", "0"),
        ("X-Stainless-Runtime", "node"),
        ("X-Stainless-Runtime-Version", "v24.3.0"),
        ("X-Stainless-Timeout", "600"),
        ("anthropic-beta", "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27"),
        ("anthropic-dangerous-direct-browser-access", "true"),
        ("anthropic-version", "2023-06-01"),
        ("x-app", "cli"),
        ("Connection", "keep-alive"),
        ("Host", "127.0.0.1:4100"),
        ("Accept-Encoding", "gzip, deflate, br, zstd"),
    ),
)
RESPONSE_HEAD = ResponseHead(
    status=200,
    reason="OK",
    headers=(("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache")),
)


class CodingAgent:
    """One conversation.

    Attributes:
        plain: text as people and programs write it; otherwise random letters, which hardly compress.
    """

    def __init__(self, *, seed: int = 1, plain: bool = True) -> None:
        self._random = random.Random(seed)
        self._plain = plain
        self._vocabulary = ["".join(self._random.choices(_LETTERS, k=self._random.randint(2, 9))) for _ in range(4000)]
        self._messages = [_dump({"role": "user", "content": [{"type": "text", "text": "Fix the failing test."}]})]
        self._fixed = self._fixed_part()
        self.turns = 0

    def say(self, text: str) -> None:
        """The user says something before the next turn."""
        self._messages.append(_dump({"role": "user", "content": [{"type": "text", "text": text}]}))

    def body(self) -> bytes:
        """The request of the present turn, with the marker on the last message."""
        *earlier, last = self._messages
        marked = last.removesuffix("}]}") + ',"cache_control":{"type":"ephemeral"}}]}'
        messages = ",".join([*earlier, marked])
        return f'{{"model":"claude-sonnet-4-5","messages":[{messages}],{self._fixed},"stream":true}}'.encode()

    def answer(self) -> list[bytes]:
        """The answer to it, as the pieces that arrive; the next body holds it and the result of its tool."""
        tool_id, text = f"toolu_{self.turns:024}", self.text(400)
        command = {"command": f"pytest -k {self.text(60)}"}
        result = self.text(TURN_BYTES - 800)
        use = {"type": "tool_use", "id": tool_id, "name": "Bash", "input": command}
        self._messages += [
            _dump({"role": "assistant", "content": [{"type": "text", "text": text}, use]}),
            _dump({"role": "user", "content": [{"type": "tool_result", "tool_use_id": tool_id, "content": result}]}),
        ]
        self.turns += 1
        return self._events(text, tool_id, _dump(command))

    def text(self, size: int) -> str:
        if not self._plain:
            return "".join(self._random.choices(_LETTERS + _LETTERS.upper() + "0123456789+-", k=size))
        words: list[str] = []
        while size > 0:
            # Common words are common: the distribution that language and code have.
            words.append(self._vocabulary[int(4000 * self._random.random() ** 3)])
            size -= len(words[-1]) + 1
        return " ".join(words)

    def _events(self, text: str, tool_id: str, command: str) -> list[bytes]:
        usage = {"input_tokens": 5, "cache_read_input_tokens": 30_000, "cache_creation_input_tokens": 700}
        message: dict[str, Any] = {"id": f"msg_{self.turns:024}", "type": "message", "role": "assistant", "content": []}
        message |= {"model": "claude-sonnet-4-5", "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
        block: dict[str, Any] = {"type": "tool_use", "id": tool_id, "name": "Bash", "input": {}}
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": part}}
                for part in _pieces(text, 12)
            ),
            {"type": "content_block_stop", "index": 0},
            {"type": "content_block_start", "index": 1, "content_block": block},
            *(
                {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": part}}
                for part in _pieces(command, 12)
            ),
            {"type": "content_block_stop", "index": 1},
            {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {**usage, "output_tokens": 150}},
            {"type": "message_stop"},
        ]
        return [f"event: {event['type']}\ndata: {_dump(event)}\n\n".encode() for event in events]

    def _fixed_part(self) -> str:
        """Two thirds tools, one third system prompt."""
        schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
        each = FIXED_BYTES * 2 // 3 // TOOLS - len(_dump(schema)) - 60
        tools = [
            {"name": f"Tool{number}", "description": self.text(each), "input_schema": schema} for number in range(TOOLS)
        ]
        billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197;"}
        prompt = {"type": "text", "text": self.text(FIXED_BYTES // 3), "cache_control": {"type": "ephemeral"}}
        return _dump({"system": [billing, prompt], "tools": tools})[1:-1]


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
