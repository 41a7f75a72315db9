"""The documentation and the code say the same: names on both sides are compared, links followed, words watched.

What a command prints is compared by running it (tests/e2e/test_readme_tour.py); prose is compared by people.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from torpor import config, config_file
from torpor.cli.commands import COMMANDS, load
from torpor.core import errors
from torpor.core.crash import CRASH_POINTS
from torpor.core.events import Kind
from torpor.core.session import SessionStatus, diagram
from torpor.sandbox import rootfs

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src/torpor"
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"[a-z]+(_[a-z]+)+")
AVOIDED = re.compile(
    r"\b(workflows?|epochs?|callbacks?|pruned?|runners?|activity|suspend(ed)?|history)\b", re.IGNORECASE
)
"""Synonyms that the glossary rules out, as far as they have no other use here."""


def page(name: str) -> str:
    return (ROOT / name).read_text()


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def product_trees() -> Iterator[ast.Module]:
    for path in sorted(SOURCE.rglob("*.py")):
        if "testing" not in path.relative_to(SOURCE).parts:
            yield ast.parse(path.read_text())


def error_classes() -> set[str]:
    """Names of TorporError, of its subclasses wherever they are defined, and of parameters that stand for one."""
    names = {name for name, value in vars(errors).items() if isinstance(value, type)} | {"failure"}
    for tree in product_trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(base, ast.Name) and base.id in names for base in node.bases
            ):
                names.add(node.name)
    return names


def constant(node: ast.expr | None) -> Iterator[str]:
    """The string constants that an expression may be."""
    if isinstance(node, ast.IfExp):
        yield from constant(node.body)
        yield from constant(node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
        yield node.value


def codes_of(node: ast.AST, classes: set[str]) -> Iterator[str]:
    """Error codes that this piece of code gives: raised, refused over HTTP, answered over the wire, or logged."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in classes:
            yield from constant(first)
        case ast.Call(func=ast.Attribute(attr="__init__", value=ast.Call()), args=[first, *_]):
            yield from constant(first)
        case ast.Call(func=ast.Name(id="refuse"), args=[_, _, code, *_]):
            yield from constant(code)
        case ast.Assign(targets=[ast.Name(id="code")], value=value):
            yield from constant(value)
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "code":
                    yield from constant(value)
        case _:
            pass
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg == "code":
                yield from constant(keyword.value)


def codes_in_source() -> set[str]:
    classes = error_classes()
    return {code for tree in product_trees() for node in ast.walk(tree) for code in codes_of(node, classes)}


def commands() -> dict[str, list[str]]:
    """Every command with its options, those of a group by both their words."""
    return dict(commands_of({name: load(name) for name in COMMANDS}, ""))


def commands_of(commands: Mapping[str, Any], before: str) -> Iterator[tuple[str, list[str]]]:
    for name, command in commands.items():
        words = [
            word for parameter in command.params if parameter.param_type_name == "option" for word in parameter.opts
        ]
        yield before + name, [word for word in words if word not in {"--help", "-h"}]
        if isinstance(command, typer.core.TyperGroup):
            yield from commands_of(command.commands, f"{before}{name} ")


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of the same level."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {heading!r}"
    return found[1]


def rows(text: str) -> set[str]:
    """The names in backticks that begin the rows of a page's tables."""
    names: set[str] = set()
    for line in text.splitlines():
        if line.startswith("| `"):
            names.update(re.findall(r"`([^`]+)`", line.split(" | ")[0]))
    return names


def test_every_error_code_is_documented_and_no_other() -> None:
    documented = {name for name in rows(page("docs/errors.md")) if CODE.fullmatch(name)}
    assert documented == codes_in_source()


def test_every_error_class_is_documented_with_its_exit_status() -> None:
    text = page("docs/errors.md")
    for value in vars(errors).values():
        if isinstance(value, type) and value not in {errors.TorporError, errors.Superseded}:
            heading = re.search(rf"^## {value.__name__}.*$", text, re.MULTILINE)
            assert heading, value.__name__
            told = re.search(r"exit status (\d+)", heading[0])
            assert told, heading[0]
            assert int(told[1]) == value.exit_status


def test_every_exit_status_is_documented() -> None:
    told = section(page("docs/cli.md"), "Exit statuses")
    for value in vars(errors).values():
        if isinstance(value, type):
            assert f"| {value.exit_status} |" in told


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_of_a_command_is_documented(name: str) -> None:
    text = section(page("docs/cli.md"), f"torpor {name}")
    missing = [word for word in commands()[name] if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)]
    assert missing == []


def test_no_command_is_documented_that_does_not_exist() -> None:
    told = set(re.findall(r"^## torpor ([\w -]+)$", page("docs/cli.md"), re.MULTILINE))
    assert told == set(commands())


def test_the_readme_names_every_command() -> None:
    table = section(page("README.md"), "Commands")
    assert {name for name in commands() if f"`torpor {name}" not in table} == set()


def test_the_readme_names_every_package_that_set_up_installs() -> None:
    script = page("scripts/setup")
    packages = set(re.findall(r"^need \S+ (\S+)$", script, re.MULTILINE)) | set(
        re.findall(r"missing\+=\(([a-z][a-z0-9-]*)\)", script)
    )
    assert packages
    assert {name for name in packages if f"`{name}`" not in page("README.md")} == set()


def test_every_configuration_field_is_documented() -> None:
    table = rows(section(page("docs/configuration.md"), "Model providers"))
    upstream_fields = set(config_file.UpstreamFields.__struct_fields__)
    assert upstream_fields <= table
    tables = {
        "retention": ("Retention", config_file.RetentionFields),
        "collect": ("Collecting", config_file.CollectFields),
        "hibernate": ("Hibernation", config_file.HibernateFields),
        "store": ("Snapshot store", config_file.StoreFields),
    }
    for title, written in tables.values():
        assert set(written.__struct_fields__) == rows(section(page("docs/configuration.md"), title))
    others = rows(section(page("docs/configuration.md"), "Other settings of config.toml"))
    assert set(config_file.FileFields.__struct_fields__) - {"upstreams", "prices", *tables} == others
    assert {field.name for field in fields(config.Upstream)} - {"name", "key"} <= table
    prices = rows(section(page("docs/configuration.md"), "Prices"))
    assert set(config_file.PriceFields.__struct_fields__) <= prices
    assert set(config.FAMILIES) == set(get_args(config_file.Family))
    for family in config.FAMILIES:
        assert f'"{family}"' in page("docs/configuration.md")
        assert config.DEFAULT_BASE_URLS[family] in page("docs/configuration.md")


def test_every_environment_variable_is_documented() -> None:
    named: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        named.update(re.findall(r"\bTORPOR_[A-Z_]*[A-Z]\b", path.read_text()))
    for path in (ROOT / "native/init").glob("*.c"):
        named.update(re.findall(r'"(TORPOR_[A-Z_]*[A-Z])=', path.read_text()))
    text = page("docs/configuration.md")
    assert {name for name in named if f"`{name}`" not in text} == set()


def test_every_variable_of_the_agent_is_documented() -> None:
    text = page("docs/configuration.md")
    for name, value in config.guest_environment().items():
        assert f"`{name.upper()}`" in text
        assert value in text


def test_everything_that_the_host_image_shows_is_documented() -> None:
    told = set(re.findall(r"`([^`]+)`", page("docs/image-host.md")))
    assert {f"/{name}" for name in rootfs.SYSTEM_DIRECTORIES} <= told
    assert set(rootfs.ETC_COPIED) <= told
    assert {f"/etc/{name}" for name in rootfs.ETC_WRITTEN} <= told
    assert set(rootfs.MASKED_IN_PYTHON) <= told


def test_every_status_is_documented_and_the_diagram_is_the_tables() -> None:
    text = page("docs/session.md")
    assert rows(section(text, "Statuses")) == {status.value for status in SessionStatus}
    assert diagram() in text


def test_every_kind_of_event_is_documented_and_no_other() -> None:
    assert rows(section(page("docs/session.md"), "Events")) == {kind.value for kind in Kind}


def test_every_crash_point_is_documented_and_no_other() -> None:
    told = set(re.findall(r"`([a-z]+\.[a-z_]+)`", section(page("docs/recovery.md"), "Crash points")))
    assert told == set(CRASH_POINTS)
    assert {point for point in CRASH_POINTS if f"`{point}`" not in page("ARCHITECTURE.md")} == set()


def test_every_dependency_has_a_decision() -> None:
    project = page("pyproject.toml")
    lists = re.findall(r"^(?:dependencies|test|check) = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    names = {name for part in lists for name in re.findall(r'"([a-z][a-z0-9-]+)[><=]', part)}
    decided = " ".join(path.read_text() for path in (ROOT / "docs/decisions").glob("*.md"))
    clients_under_test = {"openai", "anthropic", "google-genai"}
    assert {name for name in names - clients_under_test if f"`{name}`" not in decided} == set()


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_uses_a_synonym_of_a_glossary_word(path: Path) -> None:
    found = [match[0] for match in AVOIDED.finditer(prose(path.read_text()))]
    assert found == []


def test_every_test_that_the_claims_name_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page("docs/claims.md"))
    assert len(named) > 50
    tests = {file: (ROOT / "tests" / file).read_text() for file, _ in named}
    assert [f"{file}::{test}" for file, test in named if f"def test_{test}(" not in tests[file]] == []


def test_every_row_of_the_claims_names_a_test() -> None:
    """But for what is said not to be here, with the reason."""
    rows = [
        line for line in page("docs/claims.md").splitlines() if line.startswith("| ") and "| shown by |" not in line
    ]
    assert [row for row in rows if "::" not in row and "| not here: " not in row] == []
