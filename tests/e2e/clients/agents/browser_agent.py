"""An agent with a real browser: it opens a page over DevTools, asks a person, and looks at the page again.

browser_agent.py CHROMIUM [animated]. It knows nothing of Torpor but where to ask, and needs only Python: it speaks
DevTools over a WebSocket by hand. The page is its own server's; what is changed in it is in the browser alone.
"""

import base64
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

ASK = "http://127.0.0.1:4100/torpor/v1/ask"
FLAGS = (
    "--no-sandbox",  # It runs as root, in a sandbox of which this would be a second one.
    "--no-zygote",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--user-data-dir=/tmp/profile",
    "--remote-debugging-port=0",
)
PAGE = b"""<!doctype html><title>before</title><input id=name><ul id=list></ul>
<canvas id=canvas width=9 height=9></canvas>
<script>
  let ticks = 0;
  setInterval(() => { ticks += 1; }, 1000);
  const events = new EventSource("/events");
  const heard = [];
  events.onmessage = (event) => heard.push(event.data);
  const worker = new Worker(URL.createObjectURL(new Blob([`
    let kept; onmessage = ({data}) => { if (data === "tell") postMessage(kept); else kept = data; };
  `])));
</script>"""
ANIMATE = """
requestAnimationFrame(function turn(time) {
  document.querySelector("#list").style.marginLeft = `${time / 10 % 100}px`;
  requestAnimationFrame(turn);
});
"""
CHANGE = """
globalThis.secret = crypto.randomUUID();
document.title = secret;
document.querySelector("#name").value = secret;
document.querySelector("#list").append(Object.assign(document.createElement("li"), {textContent: secret}));
document.querySelector("#canvas").getContext("2d").fillRect(2, 2, 3, 3);
sessionStorage.setItem("secret", secret);
localStorage.setItem("secret", secret);
history.pushState({secret}, "", "#changed");
worker.postMessage(secret);
new Promise((done, failed) => {
  const opening = indexedDB.open("kept");
  opening.onupgradeneeded = () => opening.result.createObjectStore("all").put(secret, "secret");
  opening.onsuccess = done;
  opening.onerror = failed;
}).then(() => secret);
"""
LOOK = """
(async () => {
  const asked = new Promise((done) => { worker.onmessage = ({data}) => done(data); });
  worker.postMessage("tell");
  const stored = await new Promise((done, failed) => {
    const opening = indexedDB.open("kept");
    opening.onerror = failed;
    opening.onsuccess = () => {
      const getting = opening.result.transaction("all").objectStore("all").get("secret");
      getting.onsuccess = () => done(getting.result);
    };
  });
  const canvas = document.querySelector("#canvas").getContext("2d").getImageData(3, 3, 1, 1).data;
  return {
    variable: secret, title: document.title, input: document.querySelector("#name").value,
    list: document.querySelector("#list li").textContent, session_storage: sessionStorage.getItem("secret"),
    local_storage: localStorage.getItem("secret"), history: history.state.secret, worker: await asked,
    indexed_db: stored, canvas: [...canvas].join(), hash: location.hash, stream: events.readyState,
  };
})()
"""
TICK = "new Promise((done) => { const from = ticks; setInterval(() => { if (ticks > from) done(ticks); }, 50); })"


class Page(BaseHTTPRequestHandler):
    """One page, and a stream of events that stays open and brings what `say` has."""

    protocol_version = "HTTP/1.1"
    streams: ClassVar[list["Page"]] = []
    opened = threading.Semaphore(0)
    closing = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path != "/events":
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(PAGE)))
            self.end_headers()
            self.wfile.write(PAGE)
            return
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.streams.append(self)
        self.opened.release()
        self.closing.wait()

    def say(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Nothing: the output is what the test reads."""


class DevTools:
    """One page's WebSocket (RFC 6455): masked text frames out, unmasked ones in; the browser sends no fragments."""

    def __init__(self, url: str) -> None:
        host, _, path = url.removeprefix("ws://").partition("/")
        name, _, port = host.partition(":")
        self._socket = socket.create_connection((name, int(port)))
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert self._file.readline().split()[1] == b"101"
        while self._file.readline().strip():
            continue
        self._numbers = itertools.count(1)

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._send(json.dumps({"id": number, "method": method, "params": parameters}).encode())
        while (answer := json.loads(self._receive())).get("id") != number:
            continue
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def evaluate(self, script: str) -> Any:
        found = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _send(self, data: bytes) -> None:
        mask = os.urandom(4)
        size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
        self._socket.sendall(b"\x81" + size + mask + masked)

    def _receive(self) -> bytes:
        first, size = self._file.read(2)
        assert first == 0x81, f"not a whole text frame: {first:#x}"
        if size >= 126:
            size = int.from_bytes(self._file.read(2 if size == 126 else 8), "big")
        return self._file.read(size)


def processes() -> dict[str, str]:
    """What runs besides this: when each process began, by id, unless it has ended."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        if fields[0] != "Z":
            found[pid] = fields[19]
    return found


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    browser = subprocess.Popen([sys.argv[1], *FLAGS, address], stderr=subprocess.PIPE, text=True)
    assert browser.stderr is not None
    [listening] = itertools.islice((line for line in browser.stderr if "DevTools listening" in line), 1)
    threading.Thread(target=browser.stderr.read, daemon=True).start()
    Page.opened.acquire()

    port = listening.split("ws://")[1].split("/")[0]
    with urllib.request.urlopen(f"http://{port}/json/list") as answer:
        [page] = [target for target in json.load(answer) if target["url"] == address]
    tools = DevTools(page["webSocketDebuggerUrl"])
    secret = tools.evaluate(CHANGE)
    if "animated" in sys.argv:
        tools.evaluate(ANIMATE)
    before, ticks, running = tools.evaluate(LOOK), tools.evaluate(TICK), processes()

    with urllib.request.urlopen(ASK, b'{"question": "Submit?"}') as answer:
        said = json.load(answer)["answer"]

    after, later = tools.evaluate(LOOK), tools.evaluate(TICK)
    Page.streams[0].say("still there")
    heard = tools.evaluate("new Promise((done) => setInterval(() => { if (heard.length) done(heard); }, 50))")
    picture = base64.b64decode(tools.do("Page.captureScreenshot")["data"])
    found = {
        "answer": said,
        "secret": secret,
        "before": before,
        "after": after,
        "ticks": [ticks, later],
        "heard": heard,
        "streams": len(Page.streams),
        "same_processes": running == processes(),
        "processes": len(running),
        "picture": picture[:8].hex(),
    }
    tools.do("Browser.close")
    found["exit"] = browser.wait()
    Page.closing.set()
    print(json.dumps(found))


main()
