"""Where the CUDA sources lie: for compilation at run time, and for records."""

import pathlib
import re


def device_headers() -> pathlib.Path:
    """The folder of the device headers (*.cuh, params.h). FileNotFoundError if this installation has none."""
    package = pathlib.Path(__file__).resolve().parent
    folders = [package / "csrc", package.parent / "csrc"]  # in an installed wheel; in a checkout
    for folder in folders:
        if (folder / "params.h").is_file():
            return folder
    raise FileNotFoundError(f"no CUDA headers: params.h is neither in {folders[0]} nor in {folders[1]}; reinstall sbkernels")


def kernel_sources() -> list[pathlib.Path]:
    """All of the CUDA sources."""
    return sorted(path for pattern in ("*.cu", "*.cuh", "*.cpp", "*.h") for path in device_headers().glob(pattern))


def included(source: str) -> list[pathlib.Path]:
    """The device headers that a source includes, and those that they include."""
    folder, found, texts = device_headers(), set(), [source]
    while texts:
        new = {folder / name for name in re.findall(r'^#include "(.+)"', texts.pop(), re.MULTILINE)} - found
        texts += [path.read_text() for path in new]
        found |= new
    return sorted(found)
