"""A tool loop on an agent framework, as its own documentation shows it. It knows nothing of Torpor.

framework_agent.py openai-agents|pydantic-openai|pydantic-anthropic|langchain TASK
"""

import asyncio
import os
import subprocess
import sys

MODEL = "scripted-large"
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"


def show(text: str) -> None:
    """A piece of the model's words, as soon as it is there."""
    print(text, end="", flush=True)


def run_shell(command: str) -> str:
    """Run a shell command and get its output."""
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=240)
    return f"{finished.stdout}{finished.stderr}exit status {finished.returncode}"


async def openai_agents(task: str) -> None:
    from agents import Agent, Runner, function_tool

    agent = Agent(name="builder", model=MODEL, tools=[function_tool(run_shell)])
    running = Runner.run_streamed(agent, task, max_turns=20)
    async for event in running.stream_events():
        if event.type == "raw_response_event":
            if event.data.type == "response.output_text.delta":
                show(event.data.delta)
            elif event.data.type == "response.completed":
                show("\n")


async def pydantic(task: str, model: str) -> None:
    from pydantic_ai import Agent, PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta

    agent = Agent(model, tools=[run_shell])
    async with agent.iter(task) as running:
        async for node in running:
            if not Agent.is_model_request_node(node):
                continue
            async with node.stream(running.ctx) as events:
                async for event in events:
                    if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
                        show(event.part.content)
                    elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
                        show(event.delta.content_delta)
            show("\n")


async def langchain(task: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, use_responses_api=False).bind_tools([tool(run_shell)])
    messages = [HumanMessage(task)]
    while True:
        whole = None
        async for chunk in model.astream(messages):
            show(chunk.text)
            whole = chunk if whole is None else whole + chunk
        show("\n")
        messages.append(whole)
        calls = whole.tool_calls
        messages += [ToolMessage(run_shell(**call["args"]), tool_call_id=call["id"]) for call in calls]
        if not calls:
            return


def main(framework: str, task: str) -> None:
    match framework:
        case "openai-agents":
            asyncio.run(openai_agents(task))
        case "pydantic-openai":
            asyncio.run(pydantic(task, f"openai-chat:{MODEL}"))
        case "pydantic-anthropic":
            asyncio.run(pydantic(task, f"anthropic:{MODEL}"))
        case "langchain":
            asyncio.run(langchain(task))


if __name__ == "__main__":
    main(*sys.argv[1:])
