"""Asks the same question five times at once, tells the answers, and waits until its sandbox was restored twice."""

import asyncio
import time
from pathlib import Path

import openai

HOOK = Path("/run/torpor/after-restore.d/count")
INCARNATION = Path("/workspace/incarnation")


async def answer(client: openai.AsyncOpenAI) -> str:
    messages = [{"role": "user", "content": "What is best?"}]
    async with client.chat.completions.stream(model="scripted-large", messages=messages) as stream:
        return (await stream.get_final_completion()).choices[0].message.content


async def ask() -> list[str]:
    async with openai.AsyncOpenAI() as client:
        return await asyncio.gather(*(answer(client) for _ in range(5)))


HOOK.parent.mkdir(parents=True, exist_ok=True)
HOOK.write_text(f"#!/bin/sh\necho $TORPOR_INCARNATION > {INCARNATION}\n")
HOOK.chmod(0o755)
for line in asyncio.run(ask()):
    print(line, flush=True)
while not INCARNATION.exists() or int(INCARNATION.read_text() or "0") < 3:
    time.sleep(0.05)
