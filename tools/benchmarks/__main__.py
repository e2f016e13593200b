"""Runs the benchmarks one after the other, each a program of its own (`python -m tools.benchmarks.NAME`), so that neither
threads, memory nor process groups of one reach the next. Prints their tables and writes all figures to one JSON file.

    bash tools/bench                    # all of them
    bash tools/bench hop weights --repeats 7 --json bench.json
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from workers.provenance import code_version

NAMES = ("hop", "generate", "learner", "weights", "overlap", "elastic", "swarm", "replay", "utel")
PACKAGES = ("torch", "numpy", "transformers", "pyzmq", "msgspec", "trl", "TransferQueue")
TIMEOUT_S = 3600.0


def available() -> list[str]:
    """The benchmarks that are there, in the order they run."""
    return [name for name in NAMES if Path(__file__).with_name(f"{name}.py").exists()]


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was before."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def run_one(name: str, repeats: int) -> dict[str, Any]:
    """One benchmark's rows, or why there are none. Its table goes straight to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"tools.benchmarks.{name}", "--repeats", str(repeats), "--json", str(out)]
        load, began = os.getloadavg(), time.monotonic()
        try:
            code = subprocess.run(command, timeout=TIMEOUT_S).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"{name}: not done after {TIMEOUT_S:.0f} s"}
        found = {"seconds": round(time.monotonic() - began, 1), "load_average_before": load}
        if code != 0 or not out.exists():
            return {**found, "error": f"{name}: exit code {code}" + ("" if out.exists() else ", no rows written")}
        return {**found, "rows": json.loads(out.read_text(encoding="utf-8"))}


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help=f"Some of {', '.join(NAMES)}.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Alternating runs; figures are medians over them.")] = 5,
    json_path: Annotated[Path, typer.Option("--json", help="Where all figures go.")] = Path("bench.json"),
) -> None:
    """Run the benchmarks, print their tables, and write all figures with the machine's facts to a file."""
    known = available()
    chosen = names or known
    if unknown := sorted(set(chosen) - set(known)):
        raise typer.BadParameter(f"got {', '.join(unknown)}, expected some of {', '.join(known)}", param_hint="NAME")
    result: dict[str, Any] = {"machine": machine(), "repeats": repeats, "benchmarks": {}}
    facts = result["machine"]
    print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average'][0]:.2f}, {facts['code']}", flush=True)
    for name in chosen:
        print(f"\n{name}", flush=True)
        result["benchmarks"][name] = run_one(name, repeats)
        # After each, so that a later one that is interrupted takes nothing with it.
        json_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    failed = [found["error"] for found in result["benchmarks"].values() if "error" in found]
    for error in failed:
        print(f"bench: {error}", file=sys.stderr)
    print(f"\nfigures: {json_path}")
    raise typer.Exit(1 if failed else 0)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return found.stdout.split("\n")[:-1] if found.returncode == 0 else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    typer.run(main)
