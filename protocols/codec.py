"""Messages to frames and back: a MessagePack header frame, then one raw frame per array.

Header: `{"v": protocol, "i": id, "k": kind, "a": [dtype, ...], "b": body}`. `body` is MessagePack too, decoded straight
into the kind's struct, so what does not fit ends at its first wrong byte. In it an array is the extension `ARRAY` holding
its frame's number, and the numbers run 1, 2, ... in the order of the fields. Arrays have one axis, so a frame's length
is its shape: no claimed size exists that could disagree with what has arrived. No pickle, no Python lists of numbers,
and no copy: decoded arrays are read-only views of the frames.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, get_args

import msgpack
import msgspec
import numpy as np

from protocols.link_messages import PROTOCOL
from protocols.messages import BOOL, FLOAT, INT, Message

ARRAY = 1
HEADER_LIMIT = 4 << 20
"""Bytes of header that are decoded at most; texts live there, token arrays do not."""
ARRAYS_LIMIT = 4096
"""Arrays in one message at most: a `HandBack` of a thousand samples has two each."""
MAX_ID = (1 << 63) - 1

KINDS: dict[str, type] = {str(kind.__struct_config__.tag): kind for kind in get_args(Message)}
DTYPES = {d.str: d for d in (INT, FLOAT, BOOL)}

Frame = bytes | memoryview


class Malformed(ValueError):
    """These frames are not a message of this protocol; says what, where, got and expected.

    `reason` is one of `size, header, version, kind, arrays, body`; `id` is the message's, 0 where none could be read.
    """

    def __init__(self, text: str, reason: str, id: int = 0) -> None:
        super().__init__(text)
        self.reason = reason
        self.id = id


def encode(message: Message, id: int = 0) -> list[Frame]:
    """Frames of `message`; `id` is echoed in the answer to it.

    Array frames are views, not copies: an array must not change until its message has been acknowledged. Raises
    TypeError for an array that is not int32, float32 or bool of one axis, and for a value that is no plain data.
    """
    arrays: list[np.ndarray] = []
    kind = type(message).__name__

    def reference(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            if value.ndim != 1 or value.dtype.str not in DTYPES:
                raise TypeError(f"{kind}: got an array {value.dtype.str}{list(value.shape)}, expected {_EXPECTED}")
            arrays.append(np.ascontiguousarray(value))
            return msgspec.msgpack.Ext(ARRAY, len(arrays).to_bytes(2, "little"))
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{kind}: cannot encode a {type(value).__name__}")

    body = msgspec.msgpack.encode(message, enc_hook=reference)
    if len(arrays) > ARRAYS_LIMIT:
        raise TypeError(f"{kind}: got {len(arrays)} arrays, expected at most {ARRAYS_LIMIT}")
    header = {
        "v": PROTOCOL,
        "i": id,
        "k": message.__struct_config__.tag,
        "a": [a.dtype.str for a in arrays],
        "b": body,
    }
    return [msgpack.packb(header), *(a.data.cast("B") if a.size else b"" for a in arrays)]


def decode(frames: Sequence[Frame], kinds: Collection[str] | None = None) -> tuple[int, Message]:
    """(id, message) of `frames`, arrays as read-only views of them; with `kinds`, only of these tags. Raises `Malformed`,
    and nothing else, for whatever bytes these are; its cost is linear in the header's bytes."""
    header = _header(frames)
    id = header["i"]
    try:
        if header.get("v") != PROTOCOL:
            raise Malformed(f"protocol: got version {_short(header.get('v'))}, expected {PROTOCOL}", "version")
        tag = header.get("k")
        kind = KINDS.get(tag) if isinstance(tag, str) else None
        if kind is None or (kinds is not None and tag not in kinds):
            raise Malformed(f"kind: got {_short(tag)}, expected one of {sorted(kinds or KINDS)}", "kind")
        arrays = _arrays(header.get("a"), frames[1:])
        return id, _message(kind, header.get("b"), arrays)
    except Malformed as error:
        error.id = id
        raise


def _header(frames: Sequence[Frame]) -> dict[str, Any]:
    """The header map, with a valid id."""
    size = len(frames[0]) if frames else 0
    if not 0 < size <= HEADER_LIMIT or len(frames) - 1 > ARRAYS_LIMIT:
        got = f"{max(0, len(frames) - 1)} arrays after a header of {size} bytes"
        raise Malformed(f"message: got {got}, expected at most {ARRAYS_LIMIT} after 1 to {HEADER_LIMIT} bytes", "size")
    try:
        header = msgpack.unpackb(
            frames[0],
            strict_map_key=True,
            max_array_len=ARRAYS_LIMIT,
            max_map_len=16,
            max_str_len=256,
            max_bin_len=HEADER_LIMIT,
            max_ext_len=0,
        )
    except _DECODE_ERRORS as error:
        raise Malformed(f"header: {type(error).__name__}: {_short(error)}", "header") from error
    id = header.get("i") if isinstance(header, dict) else None
    if type(id) is not int or not 0 <= id <= MAX_ID:
        raise Malformed("header: expected a map with an integer 'i', 0 to 2**63 - 1", "header")
    return header


def _arrays(dtypes: Any, frames: Sequence[Frame]) -> list[np.ndarray]:
    if not isinstance(dtypes, list) or len(dtypes) != len(frames):
        expected = len(dtypes) if isinstance(dtypes, list) else "a list of dtypes"
        raise Malformed(f"arrays: got {len(frames)} frames, expected {expected}", "arrays")
    arrays = []
    for number, (name, frame) in enumerate(zip(dtypes, frames, strict=True), start=1):
        dtype = DTYPES.get(name) if isinstance(name, str) else None
        if dtype is None:
            raise Malformed(f"array {number}: got dtype {_short(name)}, expected one of {sorted(DTYPES)}", "arrays")
        if len(frame) % dtype.itemsize:
            got = f"{len(frame)} bytes of {name}"
            raise Malformed(f"array {number}: got {got}, expected a multiple of {dtype.itemsize}", "arrays")
        array = np.frombuffer(frame, dtype=dtype)
        array.flags.writeable = False
        arrays.append(array)
    return arrays


def _message(kind: type, packed: Any, arrays: list[np.ndarray]) -> Message:
    used = 0

    def array(code: int, data: memoryview) -> np.ndarray:
        nonlocal used
        used += 1
        if code != ARRAY or len(data) != 2 or int.from_bytes(data, "little") != used or used > len(arrays):
            raise ValueError(f"extension {code} of {len(data)} bytes: expected array {used} of {len(arrays)} here")
        return arrays[used - 1]

    try:
        message: Message = msgspec.msgpack.decode(packed, type=kind, ext_hook=array, dec_hook=_accept_array)
        if used != len(arrays):
            raise ValueError(f"got {len(arrays)} arrays, expected the {used} that the body names")
        return message
    except _DECODE_ERRORS as error:
        raise Malformed(f"{kind.__name__}: {type(error).__name__}: {_short(error)}", "body") from error


def _accept_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray and isinstance(value, np.ndarray):
        return value
    raise TypeError(f"expected an array, got {type(value).__name__}")


def _short(value: object) -> str:
    """A refusal quotes what it got, but never at the length that a stranger chose."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 300 else text[:300] + "..."


_EXPECTED = f"one axis of {sorted(DTYPES)}"
_DECODE_ERRORS = (
    ValueError,  # also UnicodeDecodeError, msgpack's limits and its nesting depth
    msgspec.MsgspecError,
    TypeError,
    OverflowError,
    RecursionError,
    MemoryError,
    msgpack.UnpackException,
)
