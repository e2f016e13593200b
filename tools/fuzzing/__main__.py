"""Malformed messages for the codec and the link; exit code 1 when one of them did more than be refused.

bash tools/fuzz                                  # a million for the codec, and some for a server's sockets
bash tools/fuzz --messages 20000 --seed 3 --json fuzz.json
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from tools.fuzzing.codec import Found, fuzz_codec
from tools.fuzzing.link import fuzz_link
from workers.provenance import code_version


def main(
    messages: Annotated[int, typer.Option(min=1, help="Malformed messages for the codec.")] = 1_000_000,
    link: Annotated[int, typer.Option(min=1, help="Malformed messages over a server's sockets.")] = 50_000,
    raw: Annotated[int, typer.Option(min=0, help="Connections of each kind that are not even ZeroMQ's.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the mutations.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where all figures go.")] = None,
) -> None:
    """Feed malformed messages to the codec and the link: no crash, no hang, no growth of memory."""
    results = {"codec": fuzz_codec(messages, seed)}
    _print("codec", results["codec"])
    results["link"] = fuzz_link(link, seed, raw)
    _print("link", results["link"])
    violations = [text for found in results.values() for text in found.violations]
    for text in violations:
        print(f"VIOLATION {text[:2000]}")
    print(f"{len(violations)} violations (seed {seed})")
    if json_path is not None:
        facts = {"code": code_version(), "python": platform.python_version(), "load_average": os.getloadavg()}
        document = {"machine": facts, "seed": seed, "results": results}
        json_path.write_text(json.dumps(msgspec.to_builtins(document), indent=1), encoding="utf-8")
    raise typer.Exit(1 if violations else 0)


def _print(name: str, found: Found) -> None:
    rate = found.messages / max(found.seconds, 1e-9)
    print(
        f"{name}: {found.messages:,} messages in {found.seconds:.0f} s ({rate:,.0f}/s), slowest "
        f"{found.slowest_s * 1000:.0f} ms of CPU time, memory grew by {found.growth_mib:.1f} MiB at most"
    )
    for outcome, count in sorted(found.outcomes.items(), key=lambda item: -item[1]):
        print(f"    {count:>9,}  {outcome}")


if __name__ == "__main__":
    typer.run(main)
