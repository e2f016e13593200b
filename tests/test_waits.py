"""The list of all waits is that of the code: no deadline is missing or has another value, and no call blocks without one."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.waits import DEADLINES, NO_LIMIT, PAUSES

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for package in ("protocols", "engine", "workers") for path in sorted((ROOT / package).rglob("*.py"))]
WAITS = {"wait", "join", "acquire", "result", "recv", "get", "queue_pop"}
"""Block until something comes when they are called without a limit. `result` and `get` of our own that do not block have
arguments or are in OURS."""
COLLECTIVES = {"all_reduce", "all_gather", "barrier", "all_gather_into_tensor", "reduce_scatter"}
OURS = {"digest.result()", "digests.result()", "self._said.get()"}
"""A hash that is ready; a queue that is not empty, and has one reader."""


def test_every_deadline_and_pause_of_the_code_is_listed_with_its_value() -> None:
    listed = {wait.name: wait.seconds for wait in (*DEADLINES, *PAUSES)}
    assert len(listed) == len(DEADLINES) + len(PAUSES), "listed twice"
    assert dict(sorted(found_in_code())) == dict(sorted(listed.items()))


def test_every_call_that_blocks_without_a_limit_is_listed_with_its_reason() -> None:
    found = {(str(path.relative_to(ROOT)), call) for path in FILES for call in unlimited(parsed(path))}
    assert found == {(each.file, each.call) for each in NO_LIMIT}


@pytest.mark.parametrize(
    "line",
    ["event.wait()", "thread.join()", "queue.get()", "subprocess.run(['a'])", "changed.wait_for(ready)",
     "dist.barrier()", "lock.acquire()", "queue.get(timeout=None)", "process.communicate()"],
)  # fmt: skip
def test_such_a_call_is_seen(line: str) -> None:
    assert list(unlimited(ast.parse(line))) == [ast.unparse(ast.parse(line))]


@pytest.mark.parametrize(
    "line",
    ["event.wait(1.0)", "thread.join(left)", "queue.get(timeout=5)", "subprocess.run(['a'], timeout=5)", "d.get('a')",
     "changed.wait_for(ready, 3.0)", "', '.join(names)", "x.gather(1, order)"],
)  # fmt: skip
def test_a_call_with_a_limit_is_not(line: str) -> None:
    assert list(unlimited(ast.parse(line))) == []


def test_the_table_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers.waits"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert (
        "| `workers.learner.PULL_TIMEOUT_S` | 300 | the learner, for groups that are ready | an error |" in done.stdout
    )


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def found_in_code() -> Iterator[tuple[str, float]]:
    """Constants of a module named `..._S` (of several values the last: the most), and fields named `..._s` with a default."""
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = parsed(path)
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                yield from ((f"{module}.{name}", value) for name, value in constants(node))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and field.value and ast.unparse(field.target).endswith("_s"):
                        yield f"{node.name}.{ast.unparse(field.target)}", number(field.value)


def constants(node: ast.Assign | ast.AnnAssign) -> Iterator[tuple[str, float]]:
    assert node.value is not None
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
        else:
            pairs = [(target, node.value)]
        for name, value in pairs:
            if isinstance(name, ast.Name) and name.id.endswith("_S"):
                yield name.id, number(value)


def number(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return number(node.left) * number(node.right)
    value = ast.literal_eval(node)
    return float(max(value) if isinstance(value, tuple) else value)


def unlimited(tree: ast.AST) -> Iterator[str]:
    """Calls that may block for ever, as they are written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            call, name, of = ast.unparse(node), node.func.attr, ast.unparse(node.func.value)
            limits = [k for k in node.keywords if k.arg and "timeout" in k.arg and ast.unparse(k.value) != "None"]
            limits += [k for k in node.keywords if k.arg == "block" and ast.unparse(k.value) == "False"]
            if limits or call in OURS:
                continue
            if (
                (name in WAITS and not node.args)
                or (name == "queue_pop" or (of == "asyncio" and name == "wait"))
                or (name == "wait_for" and len(node.args) == 1)
                or (of == "dist" and name in COLLECTIVES)
                or (of == "subprocess" and name in {"run", "check_output", "check_call", "call"})
                or name == "communicate"
            ):
                yield call
