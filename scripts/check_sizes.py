"""Fail when a file has more than 500 lines or a function more than 70: trouble lives in the top 1%."""

import ast
import re
import subprocess
import sys
from pathlib import Path

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70


def python_functions(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def c_functions(path: Path) -> list[tuple[str, int]]:
    """A function body starts with `{` and ends with `}`, each alone in the first column."""
    found: list[tuple[str, int]] = []
    name, start = "", 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        heading = re.match(r"[A-Za-z].*?\b(\w+)\(", line)
        if heading:
            name, start = heading[1], number
        elif line == "}" and name:
            found.append((name, number - start + 1))
            name = ""
    return found


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    problems: list[str] = []
    for name in listed.stdout.splitlines():
        path = Path(name)
        if path.suffix not in {".py", ".c", ".h", ".sql"} or not path.exists():
            continue
        lines = len(path.read_text().splitlines())
        if lines > FILE_LINES_MAX:
            problems.append(f"{name}: {lines} lines, at most {FILE_LINES_MAX}")
        functions = python_functions(path) if path.suffix == ".py" else c_functions(path)
        problems += [
            f"{name}: {function} has {length} lines, at most {FUNCTION_LINES_MAX}"
            for function, length in functions
            if length > FUNCTION_LINES_MAX
        ]
    print("\n".join(problems) or "sizes: every file and function is within bounds")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
