"""Where the CUDA sources lie, for compilation at run time."""

import pathlib


def device_headers() -> pathlib.Path:
    """The folder of the device headers (*.cuh, params.h). FileNotFoundError if this installation has none."""
    package = pathlib.Path(__file__).resolve().parent
    folders = [package / "csrc", package.parent / "csrc"]  # in an installed wheel; in a checkout
    for folder in folders:
        if (folder / "params.h").is_file():
            return folder
    raise FileNotFoundError(f"no CUDA headers: params.h is neither in {folders[0]} nor in {folders[1]}; reinstall sbkernels")
