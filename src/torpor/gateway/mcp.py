"""The sandbox's own API as an MCP server (Streamable HTTP at /mcp): the same table as tools.

Without state: no session id, no stream of ours, one JSON answer for one JSON-RPC request. So a restored agent's client
finds the server that it knew. Pure, as `gateway.agent_api` is: only tools/call becomes a call in the log.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import msgspec

from torpor.gateway.agent_api import RULES, Reply, RpcId, Rule, Wish, parse, refuse_method
from torpor.gateway.request import Request

PATH = "/mcp"
VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
"""Revisions of the protocol that begin with `initialize`, newest first; they say the same about what is spoken here."""

INVALID_REQUEST, METHOD_UNKNOWN, PARAMS_INVALID = -32600, -32601, -32602


class _Message(msgspec.Struct, frozen=True):
    """A JSON-RPC message of a client; one without a method is an answer, to something we never asked."""

    jsonrpc: str
    method: str | None = None
    id: RpcId | None = None
    params: dict[str, Any] = {}


def read_wish(request: Request, body: bytes) -> Wish | Reply:
    """What a request to /mcp asks for.

    Raises:
        Refused: it is no message of the protocol.
    """
    line = request.line
    if line.method != "POST":
        raise refuse_method(line, "POST")
    message: _Message = parse(body, _Message)
    if message.id is None or message.method is None:
        return Reply(status=202, body={})
    if message.jsonrpc != "2.0":
        return _error(message.id, INVALID_REQUEST, "this is not JSON-RPC 2.0")
    match message.method:
        case "initialize":
            return _result(message.id, _initialized(message.params))
        case "ping":
            return _result(message.id, {})
        case "tools/list":
            return _result(message.id, {"tools": [_tool(rule) for rule in RULES]})
        case "tools/call":
            return _wish(message.id, message.params)
        case _:
            return _error(message.id, METHOD_UNKNOWN, f"there is no method {message.method[:200]}")


def reply_of(rpc_id: RpcId, reply: Reply) -> Reply:
    """A wish's answer as the result of its tools/call; a failure is told to the model, which can do something else."""
    text = msgspec.json.encode(reply.body).decode()
    result: dict[str, Any] = {"content": [{"type": "text", "text": text}], "isError": reply.status >= 400}
    if reply.status < 400:
        result["structuredContent"] = reply.body
    return _result(rpc_id, result)


def _wish(rpc_id: RpcId, params: Mapping[str, Any]) -> Wish | Reply:
    rule = next((rule for rule in RULES if rule.tool == params.get("name")), None)
    if rule is None:
        return _error(rpc_id, PARAMS_INVALID, "there is no such tool")
    try:
        fields = msgspec.convert(params.get("arguments") or {}, rule.body)
        return Wish(rule=rule, body=fields, rpc_id=rpc_id)
    except msgspec.ValidationError as error:
        return _error(rpc_id, PARAMS_INVALID, f"the arguments of {rule.tool} are not what is wanted ({error})")


def _initialized(params: Mapping[str, Any]) -> dict[str, Any]:
    wanted = params.get("protocolVersion")
    return {
        "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[0],
        "capabilities": {"tools": {}},
        "serverInfo": {"name": "torpor", "version": version("torpor")},
        "instructions": "You run in a sandbox that Torpor saves and restores. Make a checkpoint before a risky step. "
        "A tool that waits may take days: the sandbox sleeps meanwhile.",
    }


def _tool(rule: Rule) -> dict[str, Any]:
    return {
        "name": rule.tool,
        "title": rule.summary,
        "description": rule.description,
        "inputSchema": {"properties": {}, **rule.body_schema},
        "outputSchema": rule.answer_schema,
        "annotations": {"readOnlyHint": rule.method == "GET", "destructiveHint": False, "openWorldHint": False},
    }


def _result(rpc_id: RpcId, result: Mapping[str, Any]) -> Reply:
    return Reply(status=200, body={"jsonrpc": "2.0", "id": rpc_id, "result": result})


def _error(rpc_id: RpcId, number: int, message: str) -> Reply:
    return Reply(status=200, body={"jsonrpc": "2.0", "id": rpc_id, "error": {"code": number, "message": message}})
