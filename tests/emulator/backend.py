"""The cuda backend on the CPU: makes sbkernels take a module of build.py for its extension, and CPU tensors for a GPU's."""

import importlib.util
import pathlib
import sys

import torch


def install(module: pathlib.Path):
    """For good, in this process. The extension, whose `schedule` says how the machine goes on."""
    specification = importlib.util.spec_from_file_location("sbkernels._C", module)
    extension = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(extension)
    import sbkernels

    sys.modules["sbkernels._C"] = sbkernels._C = extension
    from sbkernels.backends import cuda, hopper

    torch.cuda.get_device_capability = lambda device=None: hopper.CAPABILITY
    cuda.current_stream = lambda device: 0
    error = torch.zeros(1, dtype=torch.int32)
    hopper.error_flag = lambda device: error
    set_multiprocessors(3)
    backend = loaded()
    backend.unsupported = lambda problem: None if problem.dtype == "float16" else "is built for float16"
    launch = backend.launch
    backend.launch = lambda kernel, grid, params, device: launch(kernel, grid, params, 0)
    return extension


def set_multiprocessors(count: int) -> None:
    """As many blocks a persistent kernel has."""
    from sbkernels.backends import launches

    launches.multiprocessors = lambda device: count


def loaded():
    from sbkernels import registry

    return registry.load("cuda")
