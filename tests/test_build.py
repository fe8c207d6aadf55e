"""The build of the extension: its settings and messages, what is compiled again, and what ptxas makes of every instance."""

import concurrent.futures
import importlib.util
import itertools
import os
import re
import subprocess

import build_cuda
import pytest

ARCHITECTURES = ("80", "90a")
INSTANCES = [unit for unit in build_cuda.units() if unit.defines]
KERNEL = "__global__ void kernel(int* out) { *out = VALUE; }\n"
BINDINGS = """\
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, m) {
  m.def("runtime_version", [] { int version = 0; cudaRuntimeGetVersion(&version); return version; });
}
"""


@pytest.fixture(scope="module")
def nvcc():
    return build_cuda.find_nvcc() or pytest.skip("no nvcc")


@pytest.fixture(scope="module")
def tools(nvcc):
    try:
        return build_cuda.find_tools()
    except RuntimeError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(
    ("value", "codes"),
    [
        ("", "sm_80 sm_90a compute_90"),
        ("80", "sm_80"),
        ("80, 90a", "sm_80 sm_90a"),
        (" 80 ;90+PTX;", "sm_80 sm_90 compute_90"),
        ("120-virtual 80 80", "compute_120 sm_80"),
    ],
)
def test_architectures(monkeypatch, value, codes):
    monkeypatch.setenv("SBKERNELS_CUDA_ARCHS", value)
    flags = build_cuda.architecture_flags()
    assert [flag.rsplit("code=")[-1] for flag in flags if "code=" in flag] == codes.split()
    assert ("-DSBK_SM90A" in flags) == ("sm_90a" in codes)


@pytest.mark.parametrize("value", ["sm_80", "8.0", "70", "90A", "90+ptx", "native", "80:90a", ";"])
def test_architectures_refused(monkeypatch, value):
    monkeypatch.setenv("SBKERNELS_CUDA_ARCHS", value)
    with pytest.raises(ValueError, match=r"SBKERNELS_CUDA_ARCHS=.*Allowed: numbers from 80") as error:
        build_cuda.architecture_flags()
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("value", "means"), [("", "auto"), ("auto", "auto"), ("0", "0"), (" 1 ", "1")])
def test_requested(monkeypatch, value, means):
    monkeypatch.setenv("SBKERNELS_BUILD_CUDA", value)
    assert build_cuda.requested() == means


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", "off"])
def test_requested_refused(monkeypatch, value):
    monkeypatch.setenv("SBKERNELS_BUILD_CUDA", value)
    with pytest.raises(ValueError, match=rf"SBKERNELS_BUILD_CUDA='{value}' is none of 0 .* 1 .* auto"):
        build_cuda.requested()


def program(folder, name, says=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / name).chmod(0o755)
    return folder / name


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine whose PATH holds nothing; returns the folder that is its PATH."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build_cuda, "USUAL_CUDA", str(tmp_path / "usual"))
    return tmp_path / "bin"


def test_nvcc_is_looked_for_in_order(monkeypatch, tmp_path, bare):
    assert build_cuda.find_nvcc() is None
    release = "Cuda compilation tools, release 13.0, V13.0.88"
    places = [tmp_path / "usual" / "bin", bare, tmp_path / "path" / "bin", tmp_path / "home" / "bin"]
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    for place in places:
        made = program(place, "nvcc", release)
        assert build_cuda.find_nvcc() == str(made)
    program(tmp_path / "home" / "bin", "nvcc", "Cuda compilation tools, release 11.5, V11.5.119")
    assert build_cuda.find_nvcc() is None


def test_missing_tools_are_named(monkeypatch, bare):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"nvcc 12 or newer \(install the CUDA toolkit.*host compiler 'no-such-compiler'"):
        build_cuda.find_tools()


def test_checked(monkeypatch):
    monkeypatch.setenv("SBKERNELS_CHECKED", "1")
    assert build_cuda.checked_flags() == ["-DSBK_CHECKED"]
    monkeypatch.setenv("SBKERNELS_CHECKED", "0")
    assert build_cuda.checked_flags() == []
    monkeypatch.setenv("SBKERNELS_CHECKED", "yes")
    with pytest.raises(ValueError, match="SBKERNELS_CHECKED='yes' is neither 0"):
        build_cuda.checked_flags()


def test_units():
    names = [unit.name for unit in build_cuda.units()]
    assert len(names) == len(set(names))


def test_only_what_changed_is_built_again(tmp_path, tools, monkeypatch, capfd):
    """In folders whose names have a space. The extension it makes imports."""
    monkeypatch.setenv("SBKERNELS_CUDA_ARCHS", "80")
    csrc, build = tmp_path / "the csrc", tmp_path / "the build"
    csrc.mkdir()
    (csrc / "kernel.cu").write_text('#include "value.h"\n' + KERNEL)
    (csrc / "value.h").write_text("#define VALUE 1\n")
    (csrc / "bindings.cpp").write_text(BINDINGS)

    def built():
        capfd.readouterr()
        build_cuda.build_extension(tools, csrc, build)
        return re.findall(r"^\[\d+/\d+\] (\S+)", capfd.readouterr().out, re.MULTILINE)

    assert set(built()) == {"bindings.o", "kernel.o", build_cuda.EXTENSION_FILE}
    assert built() == []
    (csrc / "value.h").write_text("#define VALUE 2\n")
    assert built() == ["kernel.o", build_cuda.EXTENSION_FILE]
    monkeypatch.setenv("SBKERNELS_CUDA_ARCHS", "90a")
    assert built() == ["kernel.o", build_cuda.EXTENSION_FILE]

    spec = importlib.util.spec_from_file_location("_C", build / build_cuda.EXTENSION_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.runtime_version() >= 1000 * build_cuda.OLDEST_CUDA

    (csrc / "kernel.cu").write_text("not C++")
    with pytest.raises(RuntimeError, match="did not compile, see above; SBKERNELS_BUILD_CUDA=0"):
        build_cuda.build_extension(tools, csrc, build)


def ptxas_report(nvcc, unit, architecture, folder):
    """(kernel, registers, bytes of spills) of each kernel of a unit, whose products by warpgroups overlap."""
    command = build_cuda.cubin_command(nvcc, unit, architecture, folder / f"{unit.name}_{architecture}.cubin")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "wgmma" not in result.stderr, result.stderr  # C7510 and the like: "instructions are serialized"
    found = []
    for entry in result.stderr.split("Compiling entry function ")[1:]:
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", entry)))  # stores and loads, functions it calls included
        registers = re.search(r"Used (\d+) registers", entry)[1]
        found.append((entry.split("'")[1], int(registers), spills))
    return found


@pytest.fixture(scope="module")
def reports(nvcc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (unit.name, architecture): pool.submit(ptxas_report, nvcc, unit, architecture, folder)
            for unit, architecture in itertools.product(INSTANCES, ARCHITECTURES)
        }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("instance", [unit.name for unit in INSTANCES])
def test_instances_compile_without_spills(reports, instance, architecture):
    kernels = reports[instance, architecture].result()
    assert kernels, "no kernel"
    for kernel, registers, spills in kernels:
        assert spills == 0, f"{kernel}: {spills} bytes of spills at {registers} registers"
