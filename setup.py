"""Packaging of sbkernels: maps the top-level folders into one import name. See README.md for how to install."""

import pathlib

from setuptools import setup

# Folders whose bare names would collide with other people's packages live inside the sbkernels namespace.
MAPPED = {"triton_kernels": "triton_kernels"}
PACKAGES = ["sbkernels", "sbkernels.backends", "sbkernels.bench", "sbkernels.cli", "sbkernels.verify"]

TRITON = ["triton>=3.6,<3.7; platform_system == 'Linux'"]
CUPY = [f"{package}; platform_system == 'Linux'" for package in ("cupy-cuda13x>=14,<15", "nvidia-cuda-nvrtc>=13,<14")]
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-timeout>=2", "ruff>=0.9"]

setup(
    name="sbkernels",
    version="0.1.0",
    description="A kernel-engineering workbench for stick-breaking attention",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"sbkernels": "sbkernels"} | {f"sbkernels.{name}": folder for name, folder in MAPPED.items()},
    packages=PACKAGES + [f"sbkernels.{name}" for name in MAPPED],
    install_requires=["torch>=2.11,<2.14", "numpy>=1.26", "rich>=13", "safetensors>=0.4"],
    extras_require={"triton": TRITON, "cupy": CUPY, "test": TEST, "all": TRITON + CUPY + TEST},
    entry_points={"console_scripts": ["sbk = sbkernels.cli.main:main"]},
)
