"""A session whose database has a store for large bodies, and the large bodies."""

import json
import random
from pathlib import Path

from tests.unit.db.scene import HEAD, NOW, REQUEST_HEAD, Scene, new_scene

from torpor.core.ids import CallId
from torpor.db import calls, requests
from torpor.db.ahead import Ahead
from torpor.db.database import Database, Transaction, open_database
from torpor.db.requests import PreparedBody
from torpor.snapshots.backend import LocalDirectory
from torpor.testing.clock import FakeClock

MIB = 1 << 20


class BlobScene(Scene):
    """A scene that writes large bodies as a node does."""

    store: LocalDirectory

    @property
    def ahead(self) -> Ahead:
        return Ahead(database=self.database, session_id=self.session_id, owner_token=self.owner_token)

    async def ask(self, body: bytes) -> CallId:
        """A call that is intended."""
        prepared = await self.ahead.request(requests.prepare(body))
        call = self.new_call()
        await self.write(
            lambda tx: calls.intend(tx, **self.owner, call=call, head=REQUEST_HEAD, body=prepared, wall_ns=NOW),
            durable=True,
        )
        return call.call_id

    async def arriving(self, *pieces: bytes, body: bytes = b"{}") -> CallId:
        """A call of whose answer so much has come."""
        call_id = await self.write(lambda tx: self.send(tx, body))
        await self.write(lambda tx: self.add_chunks(tx, call_id, *pieces))
        return call_id

    def send_prepared(self, tx: Transaction, body: PreparedBody) -> CallId:
        """A call with a body that was stored ahead, whose answer has begun to arrive."""
        call_id = calls.intend(
            tx, **self.owner, call=self.new_call(), head=REQUEST_HEAD, body=body, wall_ns=NOW
        ).call_id
        calls.mark_sent(tx, **self.owner, call_id=call_id, wall_ns=NOW)
        calls.record_head(tx, **self.owner, call_id=call_id, attempt=1, head=HEAD, wall_ns=NOW)
        return call_id

    async def end(self, call_id: CallId) -> None:
        """Complete an answer, without what comes after it."""
        packed = await self.ahead.answer(call_id, 1)
        await self.write(
            lambda tx: calls.complete(tx, **self.owner, call_id=call_id, usage={}, packed=packed, wall_ns=NOW),
            durable=True,
        )

    async def answered(self, *pieces: bytes, body: bytes = b"{}") -> CallId:
        call_id = await self.arriving(*pieces, body=body)
        await self.end(call_id)
        await self.ahead.drop_chunks(call_id, 1)
        return call_id

    async def answer_of(self, call_id: CallId) -> bytes:
        return b"".join(chunk.data for chunk in await self.read(lambda tx: calls.load_chunks(tx, call_id, 1)))

    async def request_of(self, call_id: CallId) -> bytes:
        return (await self.read(lambda tx: requests.get_request(tx, call_id)))[1]

    @property
    def objects(self) -> list[str]:
        """The keys of all blobs in the store, whoever names them."""
        return self.store.list("blobs/")


async def open_with_blobs(directory: Path) -> Database:
    return await open_database(
        f"sqlite://{directory}/torpor.db", clock=FakeClock(), blobs=LocalDirectory(directory / "store")
    )


async def new_blob_scene(directory: Path) -> BlobScene:
    scene = await new_scene(await open_with_blobs(directory))
    made = BlobScene(scene.database, scene.session_id, scene.owner_token)
    made.store = LocalDirectory(directory / "store")
    return made


def noise(size: int, seed: int = 1) -> bytes:
    """Letters that do not compress below three quarters."""
    return random.Random(seed).randbytes(size).translate(_LETTERS)


_LETTERS = bytes(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[n % 64] for n in range(256))


def told(text: bytes, *more: str) -> bytes:
    """A request whose first message is a large text, and which goes on."""
    messages = [{"role": "user", "content": text.decode()}, *({"role": "user", "content": part} for part in more)]
    return json.dumps({"model": "m", "messages": messages}).encode()


def path_of(directory: Path, key: str) -> Path:
    """Where a local directory keeps an object."""
    kind, name = key.split("/")
    return directory / "store" / kind / name[-2:] / name


def flip_byte(path: Path) -> None:
    """Change one byte in the middle, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
