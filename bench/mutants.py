"""Faults planted in the library, one at a time: would the tests notice? `make mutants` runs both steps.

`record` runs the tests once and keeps which test runs which line. `plant` draws faults from a seed, those that
cosmic-ray's operators make, and runs for each only tests that run the changed line, until one fails, in a process of
its own that sees the changed module in place of the file. No file of the library is touched.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.machinery
import importlib.util
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType

import coverage
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parent.parent
PYTEST = ["-p", "no:cacheprovider", "-q", "--no-header", "--tb=no", "-W", "ignore", "--assert=plain"]
TESTS, SECONDS = 30, 6  # of a batch
LIMIT = 60  # seconds of the processor, not of the clock, after which a batch has failed
ROOMS = ["top", "capture", "layers", "losses", "estimators", "linalg", "operators", "optim", "influence", "spectrum"]


@dataclass
class Fault:
    """One change of one file and what became of it."""

    room: str
    path: str
    line: int
    operator: str
    occurrence: int
    diff: str = ""
    outcome: str = ""
    tests: int = 0


# --- which test runs which line -------------------------------------------------------------------------------------


class Recorder:
    """A plugin of pytest that measures each test apart: the lines it runs and its seconds."""

    def __init__(self, measured: coverage.Coverage, parameters: int, seed: int) -> None:
        self.measured, self.parameters, self.seed = measured, parameters, seed
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep a few sets of parameters of every test function."""
        functions: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            functions[function_of(item.nodeid)].append(item)
        draw = random.Random(self.seed)
        kept = {id(i) for f in functions.values() for i in draw.sample(f, min(len(f), self.parameters))}
        items[:] = [item for item in items if id(item) in kept]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.measured.switch_context(item.nodeid)
        start = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - start
        self.measured.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= {report.nodeid} if report.failed else set()


def record(data: Path, parameters: int, seed: int, tests: Sequence[str]) -> None:
    """Run a few cases of every test and write which lines each runs, and beside it the seconds of those that pass."""
    data.parent.mkdir(parents=True, exist_ok=True)
    measured = coverage.Coverage(source=["curvlib"], data_file=str(data), config_file=False)
    recorder = Recorder(measured, parameters, seed)
    with measured.collect():
        pytest.main([*PYTEST, *tests], plugins=[recorder])
    measured.save()
    passed = {test: seconds for test, seconds in recorder.seconds.items() if test not in recorder.failed}
    data.with_suffix(".seconds.json").write_text(json.dumps(passed))


def function_of(test: str) -> str:
    """The name of a test without its parameters."""
    return test.split("[")[0]


class Map:
    """Which tests run a line, as recorded."""

    def __init__(self, data: Path) -> None:
        self.data = coverage.CoverageData(str(data))
        self.data.read()
        self.seconds: dict[str, float] = json.loads(data.with_suffix(".seconds.json").read_text())

    def tests(self, path: str, line: int, source: str) -> list[str]:
        """The tests that run the statement around a line; for one that runs on import, those that run the file."""
        lines = self.data.contexts_by_lineno(str(ROOT / path))
        first = max(s.lineno for s in ast.walk(ast.parse(source)) if isinstance(s, ast.stmt) and s.lineno <= line)
        found = {test for at in range(first, line + 1) for test in lines.get(at, ())}
        if "" in found:
            found = set(itertools.chain.from_iterable(lines.values()))
        return sorted(found & self.seconds.keys())

    def batches(self, path: str, tests: Sequence[str], draw: random.Random) -> Iterator[list[str]]:
        """First the quickest case of each test in files named after the module, then whatever else is drawn."""
        words = set(Path(path).with_suffix("").parts[1:]) | set(Path(path).stem.split("_"))
        slowest_first = sorted(tests, key=lambda t: self.seconds[t], reverse=True)
        quickest = {function_of(test): test for test in slowest_first}
        near = [t for t in quickest.values() if words & set(Path(t.split("::")[0]).stem.split("_"))]
        near = self.affordable(sorted(near, key=lambda t: self.seconds[t]))
        yield near
        others = sorted(set(tests) - set(near))
        yield self.affordable(draw.sample(others, len(others)))

    def affordable(self, tests: Sequence[str]) -> list[str]:
        """The first tests that together take no longer than a batch may."""
        total = itertools.accumulate(self.seconds[test] for test in tests)
        return [test for test, seconds in zip(tests, total, strict=True) if seconds < SECONDS][:TESTS]


# --- faults -------------------------------------------------------------------------------------------------------


def files(room: str) -> list[str]:
    """The files of a package of the library, or one file; `top` are those beside the packages."""
    folder = ROOT / "curvlib" / room.replace("top", "")
    found = [folder] if folder.suffix == ".py" else sorted(folder.glob("*.py"))
    return [str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"]


def meaning(source: str) -> str:
    """What of a module runs: its syntax tree without annotations."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = None  # type: ignore[assignment]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
    return ast.dump(tree)


def places(path: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """The operators of cosmic-ray that apply at each position of a file, with their number of the occurrence."""
    found: dict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    nodes = list(ast_nodes(get_ast((ROOT / path).read_text())))
    for name in operator_names():
        if get_operator(name).arguments():
            continue
        operator: Operator = get_operator(name)()
        positions = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, start in enumerate(positions):
            found[start].append((name, occurrence))
    return found


def drawn(room: str, paths: Sequence[str], lines: Map, draw: random.Random) -> Iterator[tuple[Fault, str, list[str]]]:
    """Faults of a room without end: a position at random, then one operator there; only where a test runs."""
    found = {path: places(path) for path in paths}
    positions = [(path, at) for path in paths for at in sorted(found[path])]
    draw.shuffle(positions)
    for path, at in positions:
        name, occurrence = draw.choice(found[path][at])
        source = (ROOT / path).read_text()
        changed = mutate_code(source, get_operator(name)(), occurrence)
        tests = lines.tests(path, at[0], source)
        try:
            if not tests or meaning(changed) == meaning(source):
                continue
        except SyntaxError:
            continue
        both = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0)
        diff = "\n".join(line for line in itertools.islice(both, 2, None) if not line.startswith("@@"))
        yield Fault(room, path, at[0], name.removeprefix("core/"), occurrence, diff), changed, tests


class Changed(importlib.machinery.SourceFileLoader):
    """Imports a module, and with it the finder that stands for it, from a text in place of its file."""

    def __init__(self, path: str, source: str) -> None:
        super().__init__(path.removesuffix(".py").replace("/", "."), str(ROOT / path))
        self.source = source

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def passes(path: str, source: str, tests: Sequence[str]) -> bool:
    """Whether tests pass with a changed module, in a process of its own."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        signal.alarm(10 * LIMIT)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.meta_path.insert(0, Changed(path, source))
        os._exit(pytest.main([*PYTEST, "-x", *tests]))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def plant(data: Path, names: Sequence[str], sample: int, seed: int, results: Path) -> list[Fault]:
    """Plant so many faults in every room, run their tests, print what survives and write everything."""
    for module in ("hypothesis", "torch._dynamo", "torch._refs", "scipy.linalg"):  # once, before processes fork
        importlib.import_module(module)
    lines, faults = Map(data), []
    for room in names:
        faults_drawn = drawn(room, files(room), lines, random.Random(f"{seed} {room}"))
        for fault, source, tests in itertools.islice(faults_drawn, sample):
            fault.outcome = "survived"
            for batch in filter(None, lines.batches(fault.path, tests, random.Random(seed))):
                fault.tests += len(batch)
                if not passes(fault.path, source, batch):
                    fault.outcome = "caught"
                    break
            faults.append(fault)
            results.write_text(json.dumps([asdict(f) for f in faults], indent=1))
            if fault.outcome == "survived":
                print(f"{fault.path}:{fault.line} {fault.operator}, {fault.tests} tests\n{fault.diff}", flush=True)
    return faults


def table(faults: Sequence[Fault]) -> str:
    """Count the faults of every room."""
    rows = ["room          planted  caught  survived"]
    for room in dict.fromkeys(f.room for f in faults):
        here = [f.outcome for f in faults if f.room == room]
        rows.append(f"{room:12s} {len(here):8d}{here.count('caught'):8d}{here.count('survived'):10d}")
    return "\n".join(rows)


def main() -> None:
    """Record or plant, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["record", "plant"])
    parser.add_argument("--data", type=Path, default=ROOT / "outputs" / "mutants.coverage")
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "mutants.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="*", default=ROOMS, help="packages or files of curvlib")
    parser.add_argument("--sample", type=int, default=25, help="faults a room")
    parser.add_argument("--parameters", type=int, default=3, help="sets of parameters of each test that are recorded")
    parser.add_argument("--tests", nargs="*", default=["curvlib", "tests"])
    chosen = parser.parse_args()
    if chosen.step == "record":
        record(chosen.data, chosen.parameters, chosen.seed, chosen.tests)
    else:
        print(table(plant(chosen.data, chosen.rooms, chosen.sample, chosen.seed, chosen.results)))


if __name__ == "__main__":
    main()
