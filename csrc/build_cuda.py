"""Builds the extension sbkernels._C with nvcc and ninja: what setup.py and the tests call.

Imports neither setuptools nor sbkernels. nvcc drives everything, bindings and linking included: it knows where its headers and
libraries lie, however the toolkit was installed.
"""

from __future__ import annotations

import filecmp
import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass

CSRC = pathlib.Path(__file__).resolve().parent
# NOTE: not setuptools' build_temp, which is a new folder for each `pip install -e .`: here unchanged units stay compiled.
BUILD = CSRC.parent / "build" / "cuda"
EXTENSION_FILE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
USUAL_CUDA = "/usr/local/cuda"
OLDEST_CUDA = 12  # the first release with sm_90a

BUILD_CUDA = "SBKERNELS_BUILD_CUDA"
CUDA_ARCHS = "SBKERNELS_CUDA_ARCHS"
CHECKED = "SBKERNELS_CHECKED"
DEFAULT_ARCHS = "80;90a;90-virtual"  # the last is PTX, which the driver compiles for newer GPUs

DTYPES = ("half", "bfloat")  # types of instructions.cuh
BLOCK_DS = (64, 128, 192, 256)
HOPPER = ["-DSBK_SM90A"]  # the table then has the kernels that only sm_90a can run
COMPILE = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# One build serves every torch version: the CUDA runtime is inside, and its symbols are not mixed up with those torch loads.
LINK = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]


@dataclass(frozen=True)
class Unit:
    """One object file: a source and the macros that tell its instances apart."""

    name: str
    source: pathlib.Path
    defines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tools:
    """Programs and, of pybind11, the include folder."""

    nvcc: str
    host_compiler: str
    ninja: str
    pybind11: pathlib.Path


def requested() -> str:
    """SBKERNELS_BUILD_CUDA: "0", "1" or "auto". ValueError for anything else."""
    value = os.environ.get(BUILD_CUDA, "").strip() or "auto"
    if value not in ("0", "1", "auto"):
        raise ValueError(f"{BUILD_CUDA}={value!r} is none of 0 (no extension), 1 (required) and auto (if its tools are there)")
    return value


def checked_flags() -> list[str]:
    """nvcc's flags for SBKERNELS_CHECKED: kernels that compute-sanitizer can follow (hopper.cuh). ValueError if not 0 or 1."""
    value = os.environ.get(CHECKED, "").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{CHECKED}={value!r} is neither 0 (kernels for use) nor 1 (kernels that compute-sanitizer can follow)")
    return ["-DSBK_CHECKED"] if value == "1" else []


def architecture_flags() -> list[str]:
    """nvcc's flags for SBKERNELS_CUDA_ARCHS. ValueError if it is not a list of architectures."""
    value = os.environ.get(CUDA_ARCHS, "").strip() or DEFAULT_ARCHS
    flags = []
    for word in re.split(r"[;,\s]+", value.strip(";, ")):
        match = re.fullmatch(r"(\d{2,3})([af]?)(\+PTX|-virtual)?", word)
        if not match or int(match[1]) < 80:
            raise ValueError(
                f"{CUDA_ARCHS}={value!r}: {word!r} is no architecture the kernels can be built for. Allowed: numbers from 80 on, "
                "with or without a or f, as in 90a; then +PTX (machine code and PTX), -virtual (PTX only) or nothing (machine "
                "code); separated by semicolons, commas or spaces"
            )
        number = match[1] + match[2]
        if match[3] != "-virtual":
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        flags += HOPPER if number == "90a" else []
    return list(dict.fromkeys(flags))


def find_nvcc() -> str | None:
    """Path of an nvcc that is new enough: of the first in $CUDA_HOME, $CUDA_PATH, PATH and /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    folders += [os.environ.get("PATH", os.defpath), os.path.join(USUAL_CUDA, "bin")]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        return None
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if not release or int(release[1]) < OLDEST_CUDA:
        return None
    # Without links in the folder: another toolkit behind /usr/local/cuda is another command line, so everything is rebuilt.
    return str(pathlib.Path(found).parent.resolve() / "nvcc")


def find_tools() -> Tools:
    """What a build needs. RuntimeError naming all that is missing and where to get it."""
    nvcc = find_nvcc()
    host_compiler = os.environ.get("CXX") or "g++"
    # This environment's scripts first: its interpreter may run without the environment being activated.
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]))
    try:
        import pybind11
    except ImportError:
        pybind11 = None
    needs = {
        "Linux": sys.platform == "linux",
        f"nvcc {OLDEST_CUDA} or newer (install the CUDA toolkit; looked for in CUDA_HOME, CUDA_PATH, PATH, {USUAL_CUDA})": nvcc,
        f"the host compiler {host_compiler!r} (apt install g++, or set CXX to one)": shutil.which(host_compiler),
        "Python.h (apt install python3-dev)": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
        "ninja (pip install ninja)": ninja,
        "pybind11 (pip install pybind11)": pybind11,
    }
    missing = [need for need, there in needs.items() if not there]
    if missing:
        raise RuntimeError(f"sbkernels._C needs {'; '.join(missing)}")
    return Tools(nvcc, host_compiler, ninja, pathlib.Path(pybind11.get_include()))


def units(csrc: pathlib.Path = CSRC) -> list[Unit]:
    """Everything to compile: instance.cu for each dtype and BLOCK_D, every other source once."""
    found = []
    for source in sorted([*csrc.glob("*.cu"), *csrc.glob("*.cpp")]):
        if source.name == "instance.cu":
            for dtype, block_d in itertools.product(DTYPES, BLOCK_DS):
                found.append(Unit(f"instance_{dtype}_{block_d}", source, (f"-DSBK_DTYPE={dtype}", f"-DSBK_BLOCK_D={block_d}")))
        else:
            found.append(Unit(source.stem, source))
    return found


def cubin_command(nvcc: str, unit: Unit, architecture: str, cubin: pathlib.Path) -> list[str]:
    """Compiles one unit for one architecture, such as 90a; ptxas prints each kernel's registers, spills and shared memory."""
    hopper = HOPPER if architecture == "90a" else []
    flags = [*COMPILE, *unit.defines, *hopper, f"-arch=sm_{architecture}", "-Xptxas=-v"]
    return [nvcc, "-cubin", *flags, "-o", str(cubin), str(unit.source)]


def ninja_file(tools: Tools, csrc: pathlib.Path, build: pathlib.Path) -> str:
    """build.ninja: ninja runs a command again if it, a source or a header changed. Targets are relative to `build`."""
    nvcc, architectures = [tools.nvcc, "-ccbin", tools.host_compiler], architecture_flags()
    python = ["-isystem", sysconfig.get_path("include"), "-isystem", str(build / "include")]
    lines = ["rule run", "  command = $command", "  description = $out"]
    objects = []
    for unit in units(csrc):
        target, depfile, source = f"{unit.name}.o", f"{unit.name}.d", str(unit.source)
        flags = [*COMPILE, *checked_flags(), *(python if unit.source.suffix == ".cpp" else architectures), *unit.defines]
        command = [*nvcc, "-c", *flags, "-MD", "-MF", depfile, "-o", target, source]
        lines += [f"build {target}: run {_escape(source)}", f"  command = {_escape(shlex.join(command))}"]
        lines += [f"  depfile = {depfile}", "  deps = gcc"]
        objects.append(target)
    command = [*nvcc, *LINK, *architectures, "-o", EXTENSION_FILE, *objects]
    lines += [f"build {EXTENSION_FILE}: run {' '.join(objects)}", f"  command = {_escape(shlex.join(command))}", ""]
    return "\n".join(lines)


def build_extension(tools: Tools, csrc: pathlib.Path = CSRC, build: pathlib.Path = BUILD) -> pathlib.Path:
    """Builds what is out of date and returns the extension's path. RuntimeError if a compiler fails; its output is printed."""
    # NOTE: a copy, since pip's isolated builds have pybind11 in another folder each time, which would compile the bindings again.
    headers = build / "include" / "pybind11"
    shutil.copytree(tools.pybind11 / "pybind11", headers, copy_function=_copy_if_changed, dirs_exist_ok=True)
    (build / "build.ninja").write_text(ninja_file(tools, csrc, build), encoding="utf-8")
    if subprocess.run([tools.ninja, "-C", str(build)]).returncode:
        raise RuntimeError(f"sbkernels._C did not compile, see above; {BUILD_CUDA}=0 installs without it")
    return build / EXTENSION_FILE


def _escape(text: str) -> str:
    return re.sub(r"([$: ])", r"$\1", text)


def _copy_if_changed(source: str, target: str) -> None:
    if not (os.path.exists(target) and filecmp.cmp(source, target, shallow=False)):
        shutil.copyfile(source, target)
