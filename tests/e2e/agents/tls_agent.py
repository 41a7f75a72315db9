"""Holds a TLS connection open while a person thinks, and then says what of TLS still works. Server and client are here.

The answer is a new certificate for the server, made outside after the sleep.
"""

import json
import socket
import ssl
import threading
from pathlib import Path

from torpor.agent import ask

server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server_context.load_cert_chain("server.pem")
client_context = ssl.create_default_context(cafile="authority.pem")
listener = socket.create_server(("127.0.0.1", 0))


def serve() -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=echo, args=(connection,), daemon=True).start()


def echo(connection: socket.socket) -> None:
    try:
        with server_context.wrap_socket(connection, server_side=True) as secured:
            while line := secured.recv(1000):
                secured.sendall(line)
    except ssl.SSLError:
        pass  # The client refused the certificate.


def connect(session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
    plain = socket.create_connection(listener.getsockname())
    return client_context.wrap_socket(plain, server_hostname="127.0.0.1", session=session)


def echoed(connection: ssl.SSLSocket, text: str) -> bool:
    connection.sendall(text.encode())
    return connection.recv(1000).decode() == text


def handshake(session: ssl.SSLSession | None = None) -> str:
    """How a new connection begins: `full`, `ticket`, or what is wrong."""
    try:
        with connect(session) as connection:
            assert echoed(connection, "hello")
            return "ticket" if connection.session_reused else "full"
    except ssl.SSLCertVerificationError as error:
        return error.verify_message


threading.Thread(target=serve, daemon=True).start()
held = connect()
before = [echoed(held, "first"), handshake(), handshake(held.session)]
fresh = ask("A new certificate?", free_text=True)
after = [echoed(held, "second"), handshake(), handshake(held.session)]
Path("renewed.pem").write_text(fresh)
server_context.load_cert_chain("renewed.pem")
found = {"before": before, "after": after, "renewed": handshake(), "ticket_seconds": held.session.timeout}
print(json.dumps(found))
