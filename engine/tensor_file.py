"""safetensors files that are written and read one tensor at a time.

The format (huggingface/safetensors): eight bytes with the header's length, a JSON header that has every tensor's type, shape
and place, then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.gathered import Gathered

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8


def write_tensors(path: Path, tensors: Gathered, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a new file. Raises `OSError` when the disk does not take it, `ValueError` for a tensor that is not as it was
    announced."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.like.items():
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    expected = iter(tensors.like.items())
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            announced, like = next(expected)
            if (name, tensor.shape, tensor.dtype) != (announced, like.shape, like.dtype):
                got, wanted = (f"{n} {list(t.shape)} {t.dtype}" for n, t in ((name, tensor), (announced, like)))
                raise ValueError(f"{path}: got {got}, expected {wanted}")
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    if (left := next(expected, None)) is not None:
        raise ValueError(f"{path}: got no tensor, expected {left[0]}")


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is asked for, on the CPU. Raises `OSError` or `SafetensorError` for a
    file that cannot be read."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = sorted(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
