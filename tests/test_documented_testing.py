"""The page about testing: its code runs in order, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "testing.md"


def test_the_code_prints_what_the_page_says() -> None:
    names: dict[str, object] = {}
    printed = ""
    for kind, text in re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if kind == "text":
            assert printed == text
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(text, str(PAGE), "exec"), names)
        printed = output.getvalue()
