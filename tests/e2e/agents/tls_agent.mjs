// tls_agent.py for Node. The server's tickets live for four seconds: shorter than the sleep.

import { once } from "node:events";
import fs from "node:fs/promises";
import tls from "node:tls";

const TICKET_SECONDS = 4;

const server = tls.createServer({ ...(await read("server.pem")), sessionTimeout: TICKET_SECONDS });
server.on("secureConnection", (socket) => socket.on("error", () => {}).pipe(socket));
server.listen(0, "127.0.0.1");
await once(server, "listening");
const ca = await fs.readFile("authority.pem");

async function read(name) {
  const pem = await fs.readFile(name);
  return { key: pem, cert: pem };
}

async function connect(session) {
  const socket = tls.connect({ host: "127.0.0.1", port: server.address().port, ca, session });
  await once(socket, "secureConnect");
  return socket;
}

async function echoed(socket, text) {
  socket.write(text);
  return String((await once(socket, "data"))[0]) === text;
}

/** How a new connection begins: `full`, `ticket`, or what is wrong. */
async function handshake(session) {
  try {
    const socket = await connect(session);
    if (!(await echoed(socket, "hello"))) throw new Error("not echoed");
    const how = socket.isSessionReused() ? "ticket" : "full";
    socket.destroy();
    return how;
  } catch (error) {
    return error.code;
  }
}

const held = await connect();
const given = once(held, "session");
const before = [await echoed(held, "first")];
const [ticket] = await given;
before.push(await handshake(), await handshake(ticket));

const question = JSON.stringify({ question: "A new certificate?", free_text: true });
const answer = await fetch("http://127.0.0.1:4100/torpor/v1/ask", { method: "POST", body: question });
const fresh = (await answer.json()).answer;

const after = [await echoed(held, "second"), await handshake(), await handshake(ticket)];
await fs.writeFile("renewed.pem", fresh);
server.setSecureContext(await read("renewed.pem"));
const renewed = await handshake();
console.log(JSON.stringify({ before, after, renewed }));
process.exit(0);
