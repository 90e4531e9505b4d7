"""The structure of the code: imports point down, files are short, and one name means one thing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "curvlib"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module(path: Path) -> str:
    """The dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def room(name: str) -> str:
    """The package or file right below curvlib that a module belongs to."""
    return name.split(".")[1] if "." in name else name


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of the library that a piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "curvlib":
            assert node.module is not None
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in within)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "curvlib")


def at_the_top(tree: ast.Module) -> ast.Module:
    """What of a module runs when it is imported; what annotations alone need does not."""
    kept = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If))]
    return ast.Module(kept, [])


def floors() -> dict[str, int]:
    """The floor of every room by the table in docs/design.md, the ground floor being the last row."""
    text = (ROOT / "docs" / "design.md").read_text()
    table = re.search(r"\| room \|.*\n\|[ -|]*\n((?:\|.*\n)+)", text)
    assert table is not None
    rows = [row.split("|")[1] for row in table.group(1).splitlines()]
    return {name.strip("/"): -floor for floor, row in enumerate(rows) for name in re.findall(r"`([\w/]+)`", row)}


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} - {"curvlib"} == set(floors())


def test_no_room_imports_one_above() -> None:
    floor = floors()
    upward = [
        f"{module(path)} imports {name}"
        for path in FILES
        for name in imported(TREES[path])
        if room(module(path)) != "curvlib" and floor[room(name)] > floor[room(module(path))]
    ]
    assert not upward, upward


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module(path): set(imported(at_the_top(TREES[path]))) for path in FILES if path != PACKAGE / "__init__.py"}
    finished: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name not in graph:  # the package itself
            return
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in finished:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_files_are_short() -> None:
    long = {module(path): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: lines for name, lines in long.items() if lines > 450}


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module(path))
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_importing_the_library_does_not_import_the_compiler() -> None:
    program = "import sys, curvlib; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
