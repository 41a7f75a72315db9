"""Claude Code from npm, in its pinned version. Its licence is not an open one, so it is no part of the project.

Version 2.1.197 installs with Node 20; the program itself is a native one in a package of its own.
"""

from pathlib import Path

from tests.e2e.clients.npm import NpmProgram

PROGRAM = NpmProgram(
    package="@anthropic-ai/claude-code", version="2.1.197", pattern="@anthropic-ai/claude-code-*/claude"
)
ENVIRONMENT = {"DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}


def claude_code() -> Path:
    """The program, installed if need be.

    Raises:
        NotInstallable: there is no npm, or the registry does not give it.
    """
    return PROGRAM.path()
