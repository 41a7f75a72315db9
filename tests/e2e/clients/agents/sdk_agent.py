"""A tool loop on one of the providers' SDKs, as their own documentation shows it. It knows nothing of Torpor.

sdk_agent.py openai|anthropic sync|async stream|whole TASK
"""

import asyncio
import json
import os
import subprocess
import sys

MODEL = "scripted-large"
DESCRIPTION = "Run a shell command and get its output."
SCHEMA = {
    "type": "object",
    "properties": {"command": {"type": "string"}},
    "required": ["command"],
    "additionalProperties": False,
}


def show(text: str) -> None:
    """A piece of the model's words, as soon as it is there."""
    print(text, end="", flush=True)


class OpenAIChat:
    """The conversation in the shape of Chat Completions."""

    def __init__(self, asynchronous: bool) -> None:
        import openai

        self.client = openai.AsyncOpenAI() if asynchronous else openai.OpenAI()
        self.messages = []
        function = {"name": "run_shell", "description": DESCRIPTION, "parameters": SCHEMA, "strict": True}
        self.fixed = {"model": MODEL, "tools": [{"type": "function", "function": function}]}

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def whole(self):
        return self.client.chat.completions.create(messages=self.messages, **self.fixed)

    async def whole_async(self):
        return await self.whole()

    def stream(self):
        with self.client.chat.completions.stream(messages=self.messages, **self.fixed) as stream:
            for event in stream:
                if event.type == "content.delta":
                    show(event.delta)
            return stream.get_final_completion()

    async def stream_async(self):
        async with self.client.chat.completions.stream(messages=self.messages, **self.fixed) as stream:
            async for event in stream:
                if event.type == "content.delta":
                    show(event.delta)
            return await stream.get_final_completion()

    def take(self, answer) -> tuple[str, list[tuple[str, str]]]:
        """Keep an answer; gives its text and the commands that it asks for, by id."""
        message = answer.choices[0].message
        calls = message.tool_calls or []
        self.messages.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
        return message.content or "", [(call.id, json.loads(call.function.arguments)["command"]) for call in calls]

    def give(self, call_id: str, result: str) -> None:
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": result})


class Anthropic:
    """The conversation in the shape of Messages."""

    def __init__(self, asynchronous: bool) -> None:
        import anthropic

        self.client = anthropic.AsyncAnthropic() if asynchronous else anthropic.Anthropic()
        self.messages = []
        tool = {"name": "run_shell", "description": DESCRIPTION, "input_schema": SCHEMA}
        self.fixed = {"model": MODEL, "max_tokens": 1024, "tools": [tool]}

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def whole(self):
        return self.client.messages.create(messages=self.messages, **self.fixed)

    async def whole_async(self):
        return await self.whole()

    def stream(self):
        with self.client.messages.stream(messages=self.messages, **self.fixed) as stream:
            for text in stream.text_stream:
                show(text)
            return stream.get_final_message()

    async def stream_async(self):
        async with self.client.messages.stream(messages=self.messages, **self.fixed) as stream:
            async for text in stream.text_stream:
                show(text)
            return await stream.get_final_message()

    def take(self, answer) -> tuple[str, list[tuple[str, str]]]:
        """Keep an answer; gives its text and the commands that it asks for, by id."""
        self.messages.append({"role": "assistant", "content": answer.content})
        text = "".join(block.text for block in answer.content if block.type == "text")
        return text, [(block.id, block.input["command"]) for block in answer.content if block.type == "tool_use"]

    def give(self, call_id: str, result: str) -> None:
        block = {"type": "tool_result", "tool_use_id": call_id, "content": result}
        self.messages.append({"role": "user", "content": [block]})


def run_shell(command: str) -> str:
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    return f"{finished.stdout}{finished.stderr}exit status {finished.returncode}"


def main(sdk: str, mode: str, shape: str, task: str) -> None:
    chat = {"openai": OpenAIChat, "anthropic": Anthropic}[sdk](mode == "async")
    ask = getattr(chat, shape if mode == "sync" else f"{shape}_async")
    chat.say(task)
    tools = 0
    # One event loop for all turns: an asynchronous client keeps its connections in it.
    with asyncio.Runner() as runner:
        while True:
            text, calls = chat.take(runner.run(ask()) if mode == "async" else ask())
            show("\n" if shape == "stream" else f"{text}\n")
            for call_id, command in calls:
                chat.give(call_id, run_shell(command))
                tools += 1
            if not calls:
                break
    report = {"tools": tools, "key": chat.client.api_key, "variables": sorted(os.environ.values())}
    print(f"[report] {json.dumps(report)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
