"""Start an SGLang server on a PyTorch without CUDA, for tests: `python tests/sglang_cpu.py SERVER_ARGUMENTS...`.

Nothing of SGLang is changed, and no kernel is imitated: two things that its modules name when they are imported are made to be
there, and raise when they are called. What needs them (multimodal models, speculative decoding, mixtures of experts, quantised
weights) is not available this way. A child process that multiprocessing spawns runs this module's top level again, and so has the
same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType

import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


def declare_schemas() -> torch.library.Library:
    """torchvision's wheel is built for CUDA. On another PyTorch its operators are not there, and importing it fails for want of
    their schemas. Only these are declared: calling one still raises that it has no kernel."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def missing_kernel(name: str) -> Callable[..., object]:
    """What `from sgl_kernel import NAME_cpu` gives. The package has no build for this machine; any other name is an error at
    once, as it would be without the package."""
    if not name.endswith("_cpu"):
        raise AttributeError(f"sgl_kernel.{name}: this stands in for a package that is not installed here")

    def kernel(*_: object, **__: object) -> object:
        raise NotImplementedError(f"sgl_kernel.{name}: there is no such kernel here, only its name")

    return kernel


def stand_in() -> ModuleType:
    module = ModuleType("sgl_kernel")
    module.__version__ = "0"
    module.__getattr__ = missing_kernel
    return module


SCHEMAS = declare_schemas()
sys.modules["sgl_kernel"] = stand_in()

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
