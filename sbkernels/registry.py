"""The backends there are: one line each, name -> "module:Class", imported on first use, in order of preference."""

from __future__ import annotations

import functools
import importlib

BACKENDS = {
    "cuda": "sbkernels.backends.cuda:CudaBackend",
    "triton": "sbkernels.backends.triton_:TritonBackend",
    "ptx": "sbkernels.backends.ptx:PtxBackend",
    "torch": "sbkernels.backends.torch_:TorchBackend",
}


def names() -> tuple[str, ...]:
    """Registered names, preferred first."""
    return tuple(BACKENDS)


@functools.cache
def load(name: str):
    """The backend's only instance. KeyError if no such name; ImportError if what it needs is not installed."""
    module, cls = BACKENDS[name].split(":")
    return getattr(importlib.import_module(module), cls)()


def try_load(name: str):
    """(backend, None), or (None, reason) where it cannot be loaded on this machine."""
    try:
        return load(name), None
    except ImportError as error:
        return None, str(error)
