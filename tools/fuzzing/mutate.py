"""Malformed messages out of valid ones, by a seeded generator: the bytes, the frames, the header's fields, the body's values."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack

from protocols.codec import KINDS, MAX_ID

CLAIMS = [b"\xdb", b"\xc6", b"\xdd", b"\xdf", b"\xc9"]
"""MessagePack's text, binary, array, map and extension with a length of 32 bits."""
STRANGE: list[Any] = [
    None, True, -1, 0, 1, MAX_ID, (1 << 64) - 1, -(1 << 63), float("nan"), float("inf"), 1e308, "", "x" * 300, "../../x",
    "a\0b", b"", b"\xff" * 40, [], [[]], {}, {"": {}}, [0] * 300, msgpack.ExtType(1, b"\1\0"), msgpack.ExtType(1, b""),
    msgpack.ExtType(99, b"x"), "\u202e", "<f8", "|O", "<i4",
]  # fmt: skip

Frames = list[bytes]


class Mutator:
    """Endless malformed messages: the same ones for the same seed. Some come out valid all the same."""

    def __init__(self, valid: list[Frames], seed: int) -> None:
        self._valid, self._random = valid, random.Random(seed)
        self._ways: list[Callable[[Frames], Frames]] = [
            self._bytes, self._bytes, self._length, self._claim, self._frames, self._header, self._header, self._body,
            self._body, self._nested,
        ]  # fmt: skip

    def next(self) -> Frames:
        """One message: a valid one, changed in one to three ways."""
        frames = list(self._random.choice(self._valid))
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            frames = self._random.choice(self._ways)(frames)
        return frames

    def _bytes(self, frames: Frames) -> Frames:
        """Some bytes are others."""
        if not frames:
            return [self._random.randbytes(8)]
        place = self._random.randrange(len(frames))
        data = bytearray(frames[place]) or bytearray(b"\0")
        for _ in range(self._random.randint(1, 4)):
            at = self._random.randrange(len(data))
            data[at] = self._random.choice((data[at] ^ 1 << self._random.randrange(8), 0, 255, 0xC1, 128))
        return [*frames[:place], bytes(data), *frames[place + 1 :]]

    def _length(self, frames: Frames) -> Frames:
        """A frame is cut off, longer, or has a piece twice."""
        if not frames:
            return [b""]
        place = self._random.randrange(len(frames))
        data = frames[place]
        at = self._random.randrange(len(data) + 1)
        to = min(len(data), at + self._random.randint(0, 16))
        data = self._random.choice((data[:at], data[:at] + data[to:], data + data[at:to], data + b"\0", data[at:]))
        return [*frames[:place], data, *frames[place + 1 :]]

    def _claim(self, frames: Frames) -> Frames:
        """Somewhere up to 4 GiB are promised that do not follow."""
        if not frames:
            return frames
        at = self._random.randrange(len(frames[0]) + 1)
        size = self._random.choice((0xFFFFFFFF, 0x7FFFFFFF, 1 << 30, 1 << 22, 70000))
        claim = self._random.choice(CLAIMS) + size.to_bytes(4, "big")
        return [frames[0][:at] + claim + frames[0][at:], *frames[1:]]

    def _frames(self, frames: Frames) -> Frames:
        """Frames are missing, doubled or in another order."""
        frames = list(frames)
        match self._random.randrange(4):
            case 0 if frames:
                del frames[self._random.randrange(len(frames))]
            case 1:
                frames.append(self._random.randbytes(self._random.randrange(64)))
            case 2:
                self._random.shuffle(frames)
            case _:
                frames += frames[-1:] * self._random.choice((1, 2, 100))
        return frames

    def _header(self, frames: Frames) -> Frames:
        """A field of the header is another, missing, or there is one more."""
        fields = _unpacked(frames[0]) if frames else None
        if not isinstance(fields, dict):
            return frames
        name = self._random.choice(("v", "i", "k", "a", "b", "?"))
        value = self._random.choice([*STRANGE, *KINDS, ["<i4"] * self._random.randrange(5)])
        fields = {k: v for k, v in fields.items() if k != name} | ({} if self._random.random() < 0.2 else {name: value})
        return [msgpack.packb(fields), *frames[1:]]

    def _body(self, frames: Frames) -> Frames:
        """A value somewhere in the body is a strange one."""
        fields = _unpacked(frames[0]) if frames else None
        if not isinstance(fields, dict) or not isinstance(fields.get("b"), bytes):
            return frames
        body = _unpacked(fields["b"])
        if not isinstance(body, dict):
            return frames
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = self._random.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and self._random.random() < 0.7:
                place = place[key]
                continue
            if self._random.random() < 0.2 and isinstance(place, dict):
                del place[key]
            else:
                place[key] = self._random.choice(STRANGE)
            break
        return [msgpack.packb(fields | {"b": msgpack.packb(body)}), *frames[1:]]

    def _nested(self, frames: Frames) -> Frames:
        """Very deep, in the header or the body."""
        deep = self._random.choice((b"\x91", b"\x81\xa1x")) * self._random.choice((10, 600, 5000)) + b"\xc0"
        fields = _unpacked(frames[0]) if frames else None
        if isinstance(fields, dict) and self._random.random() < 0.5:
            return [msgpack.packb(fields | {"b": deep}), *frames[1:]]
        return [deep, *frames[1:]]


def _unpacked(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
