"""Listings for people: aligned, whatever is in the cells, and no wider than a table may be."""

import pytest
from rich.cells import cell_len

from torpor.cli.printer import COLUMN_WIDTH_MIN, TABLE_WIDTH, print_rows


def listed(capsys: pytest.CaptureFixture[str], *rows: dict[str, object]) -> list[str]:
    print_rows(rows, tuple(rows[0]), as_json=False, empty="nothing")
    return capsys.readouterr().out.splitlines()


def test_columns_are_as_wide_as_their_widest_cell(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"session": "ses_1", "open_calls": 12, "name": None}, {"session": "x", "open_calls": "", "name": "日本"}]
    assert listed(capsys, *rows) == [
        "SESSION  OPEN CALLS  NAME",
        "ses_1    12          -   ",
        "x        -           日本",
    ]


def test_what_looks_like_markup_or_a_control_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, {"command": "[red]a[/] \x1b[2J\n"})[1] == "[red]a[/] \\x1b[2J\\n"


def test_the_widest_columns_are_cut_and_ids_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    session = "s" * 30
    lines = listed(capsys, {"session": session, "question": "日" * 300, "command": "c" * 90, "age": "3d"})
    assert [cell_len(line) for line in lines] == [TABLE_WIDTH] * 2
    assert lines[1].startswith(f"{session}  日")
    assert "日…  c" in lines[1].replace(" …", "…")
    assert lines[1].endswith("  3d ")
    wide = listed(capsys, {str(number): "w" * 100 for number in range(10)})
    assert cell_len(wide[0]) == 10 * COLUMN_WIDTH_MIN + 9 * 2
