"""Messages to frames and back: a MessagePack header frame, then one raw frame per array.

Header: `{"v": protocol, "i": id, "k": kind, "b": body, "a": [[dtype, shape], ...]}`. In the body an array is the
extension `ARRAY` holding its frame's number. No pickle, no Python lists of numbers, and no copy: decoded arrays are
read-only views of the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import msgpack
import msgspec
import numpy as np

from protocols.messages import BOOL, FLOAT, INT, PROTOCOL, Message

ARRAY = 1
HEADER_LIMIT = 16 << 20
"""Bytes of header that are decoded at most; texts live there, token arrays do not."""

KINDS: dict[str, type] = {str(kind.__struct_config__.tag): kind for kind in get_args(Message)}
DTYPES = {d.str: d for d in (INT, FLOAT, BOOL)}


class Malformed(ValueError):
    """These frames are not a message of this protocol; says what, where, got and expected. `id` is the message's, or 0."""

    def __init__(self, reason: str, id: int = 0) -> None:
        super().__init__(reason)
        self.id = id


def encode(message: Message, id: int = 0) -> list[bytes | memoryview]:
    """Frames of `message`; `id` is echoed in the answer to it. Array frames are views, not copies."""
    arrays: list[np.ndarray] = []

    def reference(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(np.ascontiguousarray(value))
            return msgpack.ExtType(ARRAY, len(arrays).to_bytes(2, "little"))
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{type(message).__name__}: cannot encode a {type(value).__name__}")

    body = msgspec.to_builtins(message, builtin_types=(np.ndarray,), enc_hook=reference)
    packed_body = msgpack.packb(body, default=reference)
    header = {
        "v": PROTOCOL,
        "i": id,
        "k": message.__struct_config__.tag,
        "a": [[a.dtype.str, list(a.shape)] for a in arrays],
        "b": packed_body,
    }
    return [msgpack.packb(header), *(a.data.cast("B") if a.size else b"" for a in arrays)]


def decode(frames: Sequence[bytes | memoryview]) -> tuple[int, Message]:
    """(id, message) of `frames`. Raises `Malformed`; the id in it, where one could be read, is `error.id`."""
    if not frames or len(frames[0]) > HEADER_LIMIT:
        raise Malformed(f"header frame: got {len(frames[0]) if frames else 'none'} bytes, expected 1 to {HEADER_LIMIT}")
    id = 0
    try:
        header = msgpack.unpackb(frames[0], strict_map_key=True)
        if not isinstance(header, dict) or not isinstance(header.get("i"), int):
            raise Malformed("header: expected a map with an integer 'i'")
        id = header["i"]
        if header.get("v") != PROTOCOL:
            raise Malformed(f"protocol version: got {header.get('v')!r}, expected {PROTOCOL}")
        kind = KINDS.get(header.get("k", ""))
        if kind is None:
            raise Malformed(f"kind: got {header.get('k')!r}, expected one of {sorted(KINDS)}")
        arrays = _arrays(header.get("a"), frames[1:])
        body = msgpack.unpackb(
            header["b"], ext_hook=lambda code, data: arrays[int.from_bytes(data, "little") - 1], strict_map_key=False
        )
        return id, msgspec.convert({**body, "type": header["k"]}, kind, dec_hook=_accept_array)
    except Malformed as error:
        raise Malformed(str(error), id) from None
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        msgspec.ValidationError,
        msgpack.UnpackException,
        RecursionError,
    ) as error:
        raise Malformed(f"{type(error).__name__}: {error}", id) from error


def _arrays(specs: Any, frames: Sequence[bytes | memoryview]) -> list[np.ndarray]:
    if not isinstance(specs, list) or len(specs) != len(frames):
        raise Malformed(
            f"arrays: got {len(frames)} frames, expected {len(specs) if isinstance(specs, list) else 'a list of specs'}"
        )
    arrays = []
    for number, (spec, frame) in enumerate(zip(specs, frames, strict=True)):
        dtype = DTYPES.get(spec[0])
        if dtype is None:
            raise Malformed(f"array {number}: got dtype {spec[0]!r}, expected one of {sorted(DTYPES)}")
        array = np.frombuffer(frame, dtype=dtype).reshape(spec[1])
        array.flags.writeable = False
        arrays.append(array)
    return arrays


def _accept_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray and isinstance(value, np.ndarray):
        return value
    raise TypeError(f"expected an array, got {type(value).__name__}")
