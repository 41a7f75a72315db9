"""Without --matrix (`make test-matrix`) only a sample of the matrix runs: all of it takes half an hour."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
SAMPLE = (
    "test_points.py::test_a_client_survives_a_kill_at_every_point[openai-agents]",
    "test_faults.py::test_a_fault_is_never_a_whole_answer[anthropic-sync-clean cut mid-1]",
    "test_faults.py::test_a_fault_is_never_a_whole_answer[langchain-openai-reset mid-1]",
    "test_faults.py::test_a_fault_is_never_a_whole_answer[pydantic-ai-openai-500-1]",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix"):
        return
    left_out = [item for item in items if HERE in item.path.parents and not item.nodeid.endswith(SAMPLE)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
