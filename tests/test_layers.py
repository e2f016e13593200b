"""The layers hold: who may import whom, what never touches torch, and that nothing unpickles or evaluates text."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"protocols": 0, "engine": 1, "workers": 2, "tools": 3}
CLI = "workers.cli"
PROTOCOL_PACKAGES = {"msgpack", "msgspec", "numpy", "zmq", "xxhash"}
TORCH = {"torch", "transformers"}
TORCH_FREE = ["workers.buffer", "workers.reward", "workers.score", "workers.scorer_pool"]
TOP_LEVEL = {"pyproject.toml", "README.md", "engine", "workers", "protocols", "configs", "tests", "tools"}

PICKLING_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {
    "torch.load", "torch.save", "numpy.load", "np.load", "pd.read_pickle",
    "send_pyobj", "recv_pyobj", "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list",
    "send_object_list", "recv_object_list",
}  # fmt: skip
EVALUATING_CALLS = {"eval", "exec", "compile", "__import__"}
IMPORTS_BY_NAME = {"engine.rewards"}
"""The one documented hook, `module:function` for a user's own reward."""


def modules(*packages: str) -> dict[str, Path]:
    """Module name to file, for everything below these packages."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


ALL = modules(*LAYERS)
PRODUCT = modules("protocols", "engine", "workers")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports(module: str) -> frozenset[str]:
    """Full names that a module imports anywhere, inside functions and type-checking blocks too. `from a import b` gives
    `a.b` where that is a module of ours, and `a`."""
    found: set[str] = set()
    for node in ast.walk(tree(ALL[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import; name the layer"
            assert node.module is not None
            found.add(node.module)
            found |= {name for alias in node.names if (name := f"{node.module}.{alias.name}") in ALL}
    return frozenset(found)


def top(name: str) -> str:
    return name.partition(".")[0]


def called(node: ast.AST) -> Iterator[str]:
    """The dotted name of a call and its last part."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func)
            yield f".{node.func.attr}"


@pytest.mark.parametrize("module", ALL)
def test_a_module_imports_only_from_its_own_layer_and_below(module: str) -> None:
    upward = {name for name in imports(module) if LAYERS.get(top(name), 0) > LAYERS[top(module)]}
    assert not upward, f"{module} imports {sorted(upward)}"
    if top(module) != "tools":
        assert CLI not in imports(module), f"{module} imports the command line"
        assert "tests" not in {top(name) for name in imports(module)}


@pytest.mark.parametrize("module", modules("protocols"))
def test_protocols_import_only_what_a_peer_needs(module: str) -> None:
    foreign = {top(name) for name in imports(module)} - sys.stdlib_module_names - {"protocols"} - PROTOCOL_PACKAGES
    assert not foreign, f"{module} imports {sorted(foreign)}"


def test_one_file_imports_deepspeed() -> None:
    importers = [name for name in ALL if "deepspeed" in {top(found) for found in imports(name)}]
    assert importers == ["engine.learn_deepspeed"]


def reached(start: str) -> dict[str, str]:
    """Every module of ours that `start` leads to, with the one that imports it; packages on the way run too."""
    reasons = {start: ""}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        ours = {name for name in imports(module) if name in ALL}
        ours |= {parent for name in ours for parent in _parents(name)}
        for name in ours - reasons.keys():
            reasons[name] = module
            waiting.append(name)
    return reasons


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@pytest.mark.parametrize("start", TORCH_FREE)
def test_nothing_on_the_way_from_the_buffer_and_the_reward_imports_torch(start: str) -> None:
    for module, reason in reached(start).items():
        heavy = {top(name) for name in imports(module)} & TORCH
        assert not heavy, f"{module} (imported by {reason}) imports {sorted(heavy)}"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_leaves_torch_out(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({TORCH!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", PRODUCT)
def test_nothing_pickles_or_evaluates(module: str) -> None:
    assert not {top(name) for name in imports(module)} & PICKLING_MODULES
    for node in ast.walk(tree(PRODUCT[module])):
        names = set(called(node))
        plain = {name.removeprefix(".") for name in names}
        where = f"{PRODUCT[module].name}:{getattr(node, 'lineno', '?')}"
        assert not plain & PICKLING_CALLS, f"{where}: {plain & PICKLING_CALLS} pickles"
        assert not names & EVALUATING_CALLS, f"{where}: {names & EVALUATING_CALLS} runs text"
        if module not in IMPORTS_BY_NAME:
            assert ".import_module" not in names, f"{where}: import by name"
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant), f"{where}: {node.arg}"
            assert node.value.value is False, f"{where}: {node.arg}"


def test_the_repository_has_exactly_the_planned_entries() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is unknown here")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    entries = {
        top_entry for line in listed.stdout.splitlines() if not (top_entry := line.split("/")[0]).startswith(".")
    }
    assert entries == TOP_LEVEL
