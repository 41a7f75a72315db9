"""torpor-guest keeps docs/torpor-guest.md: what it sends, what it prints, how it exits; against any answer at all."""

import json
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.integration.init_client import PROGRAMS, build


@pytest.fixture(scope="module", params=PROGRAMS)
def binary(request: pytest.FixtureRequest) -> Path:
    return build(request.param)


def answer(body: object, status: int = 200) -> bytes:
    text = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        len(text),
        text,
    )


@contextmanager
def torpor(answers: Sequence[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers each connection with the next bytes; gives its address and the requests."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for said in answers:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return  # Not asked as often as it could answer.
                with connection:
                    request = connection.recv(65536)
                    head, _, body = request.partition(b"\r\n\r\n")
                    length = next(
                        (int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"Content-Length:"), 0
                    )
                    while len(body) < length:
                        body += connection.recv(65536)
                    requests.append(head + b"\r\n\r\n" + body)
                    connection.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", requests
        server.shutdown(socket.SHUT_RDWR)
        thread.join(30)


Asking = Callable[..., tuple[int, bytes, bytes, list[bytes]]]


@pytest.fixture
def ask(binary: Path) -> Asking:
    """Runs torpor-guest against answers; gives its exit status, what it printed, and the requests."""

    def run(*words: str, answers: Sequence[bytes] = (), stdin: bytes = b"") -> tuple[int, bytes, bytes, list[bytes]]:
        with torpor(answers) as (address, requests):
            command = ["torpor-guest", words[0], "--address", address, *words[1:]]
            ended = subprocess.run(
                command, executable=binary, input=stdin, capture_output=True, timeout=60, env={}, check=False
            )
        assert b"Sanitizer" not in ended.stderr
        return ended.returncode, ended.stdout, ended.stderr, requests

    return run


def sent(request: bytes) -> tuple[str, Any]:
    head, _, body = request.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), json.loads(body) if body else None


def test_each_command_makes_its_request(ask: Asking) -> None:
    cases: list[tuple[tuple[str, ...], str, Any]] = [
        (("whoami",), "GET /torpor/v1/session", None),
        (("checkpoint",), "POST /torpor/v1/checkpoint", {}),
        (("note", 'say "hé"\n\\'), "POST /torpor/v1/notes", {"text": 'say "hé"\n\\'}),
        (("note", "--", "--json"), "POST /torpor/v1/notes", {"text": "--json"}),
        (("ask", "Deploy?", "--choices", "yes,no", "--timeout", "1.5"), "POST /torpor/v1/ask",
         {"question": "Deploy?", "choices": ["yes", "no"], "timeout_seconds": 1.5}),
        (("ask", "Which?", "--choice", "a, or b", "--choice", "c", "--free-text"), "POST /torpor/v1/ask",
         {"question": "Which?", "choices": ["a, or b", "c"], "free_text": True}),
        (("sleep", "86400"), "POST /torpor/v1/sleep", {"seconds": 86400}),
        (("sleep", "--until", "2030-01-01T00:00:00Z"), "POST /torpor/v1/sleep", {"until": "2030-01-01T00:00:00Z"}),
        (("send", "done"), "POST /torpor/v1/send", {"text": "done"}),
        (("spawn", "--", "make", "-j", "2"), "POST /torpor/v1/spawn", {"command": ["make", "-j", "2"]}),
        (("receive",), "POST /torpor/v1/receive", {}),
        (("receive", "--timeout", "3"), "POST /torpor/v1/receive", {"timeout_seconds": 3}),
    ]  # fmt: skip
    for words, line, body in cases:
        status, _, _, requests = ask(*words, answers=[answer({})])
        assert (status, [sent(request) for request in requests]) == (0, [(f"{line} HTTP/1.1", body)]), words


def test_plain_answers_are_for_scripts_and_json_is_the_whole_answer(ask: Asking) -> None:
    who = {"session": "ses_1", "name": None, "incarnation": 2}
    assert ask("whoami", answers=[answer(who)])[1] == b"session: ses_1\nname: null\nincarnation: 2\n"
    assert ask("checkpoint", answers=[answer({"checkpoint": 7, "seq": 90})])[1] == b"7\n"
    assert ask("ask", "?", answers=[answer({"state": "resolved", "answer": "Ja, \U0001f600\n"})])[1] == (
        "Ja, \U0001f600\n\n".encode()
    )
    assert ask("receive", answers=[answer({"state": "resolved", "number": 1, "text": "hi"})])[1] == b"hi\n"
    assert ask("sleep", "1", answers=[answer({"woken": 1})])[1] == b""
    status, said, _, _ = ask("whoami", "--json", answers=[answer(who)])
    assert (status, json.loads(said)) == (0, who)


def test_stdin_is_read_for_a_dash_and_anything_becomes_json(ask: Asking) -> None:
    data = bytes(range(256)) * 3
    requests = ask("note", "-", answers=[answer({"seq": 1}, 201)], stdin=data)[3]
    assert sent(requests[0])[1]["text"][:128] == bytes(range(128)).decode()
    status, _, said, requests = ask("note", "-", stdin=bytes(2 << 20))
    assert (status, requests) == (2, [])
    assert b"1 MiB" in said


def test_refusals_timeouts_and_missing_routes_have_statuses_of_their_own(ask: Asking) -> None:
    refusal = {"code": "request_invalid", "message": "cannot take this request: too long", "hint": "Shorten it."}
    status, _, said, _ = ask("note", "x", answers=[answer(refusal, 400)])
    assert (status, said) == (1, b"error request_invalid: cannot take this request: too long\n  hint: Shorten it.\n")
    assert ask("note", "x", answers=[answer("?", 500)])[0] == 1
    assert ask("ask", "x", answers=[answer({"state": "timed_out", "answer": None})])[:2] == (3, b"")
    status, _, said, _ = ask("ask", "x", answers=[answer({"code": "path_unknown", "message": "", "hint": ""}, 404)])
    assert status == 4
    assert b"knows no /torpor/v1/ask" in said
    unusable = ["ask", "sleep", "sleep -5", "sleep 1 --until x", "send", "send a b", "receive x", "note a b", "spawn"]
    for words in [*unusable, "note x --timeout 1", "nothing"]:
        assert ask(*words.split())[0] == 2, words


def test_an_answer_that_was_cut_off_is_asked_for_again(ask: Asking) -> None:
    whole = answer({"checkpoint": 3, "seq": 4})
    status, said, _, requests = ask("checkpoint", answers=[b"", whole[:30], whole[:-1], whole])
    assert (status, said) == (0, b"3\n")
    assert len(set(requests)) == 1
    assert ask("checkpoint", answers=[b""] * 5)[0] == 69


def test_nobody_listening_is_told(binary: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = ["torpor-guest", "whoami", "--address", f"127.0.0.1:{free.getsockname()[1]}"]
        ended = subprocess.run(command, executable=binary, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 69
    assert b"cannot reach Torpor" in ended.stderr


def test_chunked_answers_are_read_whole(ask: Asking) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b'8\r\n{"text":\r\nA;x=y\r\n "in parts\r\n2\r\n"}\r\n0\r\n\r\n'
    assert ask("receive", answers=[head + body])[:2] == (0, b"in parts\n")
    assert ask("receive", answers=[b"SSH-2.0-x\r\n"])[0] == 69


@pytest.mark.parametrize("seed", range(30))
def test_any_bytes_for_an_answer_end_it_with_a_status(ask: Asking, seed: int) -> None:
    choice = random.Random(seed)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1c\r\n"
    data = bytearray(
        choice.choice(
            [answer({"code": "x\ud83d", "message": "é", "hint": "y"}, 400), head + b"x" * 28 + b"\r\n0\r\n\r\n"]
        )
    )
    for _ in range(choice.randint(0, 12)):
        data[choice.randrange(len(data))] = choice.randrange(256)
    with_repeats = [bytes(data)] * 5  # What looks cut off is asked for again.
    assert ask("whoami", answers=with_repeats)[0] in {0, 1, 3, 4, 69}
