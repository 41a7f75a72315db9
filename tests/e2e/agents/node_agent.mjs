// An agent in plain Node that has many things open while a person thinks: a process of its own, a server with a client
// in the middle of a line, a worker, timers and files. It asks, and then says what it finds of them.

import { spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import fs from "node:fs/promises";
import net from "node:net";
import { createInterface } from "node:readline";
import { Worker } from "node:worker_threads";

const TORPOR = "http://127.0.0.1:4100/torpor/v1";

await fetch("data:,"); // Node makes its agent for connections at the first use.
const ConnectionAgent = globalThis[Symbol.for("undici.globalDispatcher.1")].constructor;
/** Node's own patience with a silent server is five minutes; here it is shorter than the sleep. */
const dispatcher = new ConnectionAgent({ headersTimeout: 4000 });

/** Who gives up asks again: an equal question joins the one that is open. */
async function ask(question) {
  for (let tries = 1; ; tries += 1) {
    try {
      const asked = { method: "POST", body: JSON.stringify({ question }), dispatcher };
      const answer = await fetch(`${TORPOR}/ask`, asked);
      return { tries, ...(await answer.json()) };
    } catch (error) {
      if (error.cause?.code !== "UND_ERR_HEADERS_TIMEOUT") throw error;
    }
  }
}

/** A shell that keeps a variable. */
class Shell {
  #process = spawn("sh", { stdio: ["pipe", "pipe", "inherit"] });
  #lines = createInterface({ input: this.#process.stdout })[Symbol.asyncIterator]();

  async run(command) {
    this.#process.stdin.write(`${command}\n`);
    return (await this.#lines.next()).value;
  }

  async end() {
    this.#process.stdin.end();
    return (await once(this.#process, "exit"))[0];
  }
}

/** It answers each line with the number of lines of this connection so far, and the line. */
async function openServer() {
  const server = net.createServer(async (socket) => {
    let count = 0;
    for await (const line of createInterface({ input: socket })) socket.write(`${(count += 1)} ${line}\n`);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return server;
}

async function connectTo(server) {
  const socket = net.connect(server.address().port, "127.0.0.1");
  await once(socket, "connect");
  const lines = createInterface({ input: socket })[Symbol.asyncIterator]();
  return { socket, next: async () => (await lines.next()).value };
}

const KEEPER = `
  const { parentPort } = require("node:worker_threads");
  let kept;
  parentPort.on("message", (told) => (told === "tell" ? parentPort.postMessage(kept) : (kept = told)));
`;

const secret = randomUUID();
const shell = new Shell();
const shellId = await shell.run(`kept=${secret}; echo $$`);

const server = await openServer();
const client = await connectTo(server);
client.socket.write("first\n");
const first = await client.next();
client.socket.write("sec");

const worker = new Worker(KEEPER, { eval: true });
worker.postMessage(secret);

const file = await fs.open("/tmp/open", "w+");
await file.write(secret);
await fs.unlink("/tmp/open");

let ticks = 0;
const ticking = setInterval(() => (ticks += 1), 500);
let alarms = 0;
const alarm = new Promise((resolve) => setTimeout(() => resolve((alarms += 1)), 3000));
const began = { wall: Date.now(), monotonic: performance.now() };
const ticksBefore = ticks;

const { answer, tries } = await ask("Deploy?");

await alarm;
const passed = { wall: Date.now() - began.wall, monotonic: performance.now() - began.monotonic };
const stillTicking = new Promise((resolve) => {
  const upTo = ticks + 2;
  setInterval(() => ticks >= upTo && resolve(true), 100).unref();
});
client.socket.write("ond\n");
const second = await client.next();
const another = await connectTo(server);
another.socket.write("hello\n");
const hello = await another.next();
worker.postMessage("tell");
const [told] = await once(worker, "message");

console.log(JSON.stringify({
  answer,
  tries,
  passed,
  shell: { same: (await shell.run("echo $$")) === shellId, kept: (await shell.run("echo $kept")) === secret },
  connection: [first, second],
  new_connection: hello,
  worker: told === secret,
  unlinked_file: (await file.read(Buffer.alloc(99), 0, 99, 0)).buffer.toString("utf8", 0, secret.length) === secret,
  alarms,
  ticks_on: (await stillTicking) && ticks > ticksBefore,
  shell_exit: await shell.end(),
}));

clearInterval(ticking);
for (const each of [client, another]) each.socket.destroy();
server.close();
await worker.terminate();
await file.close();
