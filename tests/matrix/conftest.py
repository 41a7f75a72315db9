"""Without --matrix (`make test-matrix`) only a sample of the matrix runs: all of it takes half an hour."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
SAMPLE = (
    "[openai-agents]",
    "test_five_equal_requests_are_five_calls_and_none_more_after_restores",
    "[call.received-node-and-sandbox]",
    "[anthropic-sync-clean cut mid-1]",
    "[langchain-openai-reset mid-1]",
    "[openai-sync-500-1]",
)
"""How the names of those end that always run: one to two minutes."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix"):
        return
    left_out = [item for item in items if HERE in item.path.parents and not item.name.endswith(SAMPLE)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
