"""The codec under atheris: coverage says which bytes lead further. An input's frames are parted by a marker.

pip install atheris; bash tools/fuzz --atheris 60
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["protocols"]):
    from protocols.codec import Malformed, decode

from tools.fuzzing.samples import frames_of_samples

MARK = b"\xc1|\xc1"
"""Of a byte that MessagePack never uses."""


def feed(data: bytes) -> None:
    """One input; anything but `Malformed` ends the fuzzer with the input that did it."""
    try:
        decode(data.split(MARK))
    except Malformed:
        return


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="headrace-fuzz-") as folder:
        for number, frames in enumerate(frames_of_samples()):
            (Path(folder) / f"{number}").write_bytes(MARK.join(frames))
        atheris.Setup([sys.argv[0], *sys.argv[1:], folder], feed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
