"""Packaging of sbkernels: maps the top-level folders into one import name, builds sbkernels._C. See README.md."""

import pathlib
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402

# Folders whose bare names would collide with other people's packages live inside the sbkernels namespace.
MAPPED = {name: name for name in ("triton_kernels", "tuning", "profiles", "csrc")}
PACKAGES = ["sbkernels", *(f"sbkernels.{name}" for name in find_packages(ROOT / "sbkernels", exclude=[*MAPPED]))]

EXTENSION = "sbkernels._C"

TRITON = ["triton>=3.6,<3.7; platform_system == 'Linux'"]
CUPY = [f"{package}; platform_system == 'Linux'" for package in ("cupy-cuda13x>=14,<15", "nvidia-cuda-nvrtc>=13,<14")]
TUNE = ["optuna>=4,<6", "scipy>=1.11"]  # for the guided search alone
REPORT = ["vl-convert-python>=1.7,<2"]  # brings Vega-Lite's JavaScript
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-timeout>=2", "ruff>=0.9", "pybind11>=2.13", "ninja>=1.11"]


class BuildExtension(build_ext):
    """sbkernels._C through csrc/build_cuda.py, as far as SBKERNELS_BUILD_CUDA and the tools there allow."""

    def run(self):
        try:
            requested = build_cuda.requested()
            if requested == "0":
                return self.leave_out(f"{build_cuda.BUILD_CUDA}=0")
            try:
                self.tools = build_cuda.find_tools()
            except RuntimeError as missing:
                if requested == "auto":
                    return self.leave_out(missing)
                raise RuntimeError(f"{build_cuda.BUILD_CUDA}=1, but {missing}") from None
            super().run()
        except (RuntimeError, ValueError) as error:
            # Not as a traceback, which pip would print with dozens of lines of setuptools.
            raise SystemExit(f"error: {error}") from None

    def leave_out(self, reason):
        print(f"sbkernels is built without its CUDA extension: {reason}")
        # An earlier build's would be packed or imported.
        pathlib.Path(self.get_ext_fullpath(EXTENSION)).unlink(missing_ok=True)
        self.extensions = []

    def build_extension(self, ext):
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build_cuda.build_extension(self.tools)), str(target))


setup(
    name="sbkernels",
    version="0.1.0",
    description="A kernel-engineering workbench for stick-breaking attention",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"sbkernels": "sbkernels"} | {f"sbkernels.{name}": folder for name, folder in MAPPED.items()},
    packages=PACKAGES + [f"sbkernels.{name}" for name in MAPPED],
    package_data={
        "sbkernels.csrc": ["*.cuh", "*.h", "*.cu", "*.cpp"],
        "sbkernels.profiles": ["*.sh"],
        "sbkernels.report": ["*.html"],
        "sbkernels.tuning": ["data/*.json"],
        "sbkernels.verify": ["*.cu"],
    },
    ext_modules=[Extension(EXTENSION, sources=[])],
    cmdclass={"build_ext": BuildExtension},
    install_requires=["torch>=2.11,<2.14", "numpy>=1.26", "rich>=13", "safetensors>=0.4"],
    extras_require={
        "triton": TRITON,
        "cupy": CUPY,
        "tune": TUNE,
        "report": REPORT,
        "test": TEST,
        "all": TRITON + CUPY + TUNE + REPORT + TEST,
    },
    entry_points={"console_scripts": ["sbk = sbkernels.cli.main:main"]},
)
