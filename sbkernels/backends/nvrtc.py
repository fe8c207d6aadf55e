"""CUDA C++ to kernels at run time through CuPy: NVRTC makes a cubin (no GPU needed), the driver loads and launches it.

Cubins are kept in a folder, one file per content key: everything that decides them is hashed into the key, an entry is written
whole or not at all, and one that is damaged is compiled again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import struct
import tempfile
import warnings
from typing import NamedTuple

import numpy

try:
    from cupy.cuda import Device, Function, Module, driver, nvrtc, runtime

    VERSION = nvrtc.getVersion()  # a RuntimeError where there is no libnvrtc
except (ImportError, RuntimeError) as error:
    reason = " ".join(str(error).split())
    raise ImportError(f"CuPy with NVRTC is not installed: pip install 'sbkernels[cupy]' ({reason})") from error

from .. import env

# NVRTC looks for headers beside the source, that is in the process's working directory, before it looks where -I says.
FLAGS = ("--std=c++17", "-lineinfo", "--no-source-include", "--ptxas-options=-v")
HEADER_SUFFIXES = (".cuh", ".h")
SOURCE_NAME = "kernel.cu"  # in messages and line information

MAGIC = b"sbkcubn1"  # and the version of the entries' format
ENTRY = struct.Struct("<8sQ32s")  # MAGIC, bytes of the payload, SHA-256 of key and payload


class CompileError(RuntimeError):
    """NVRTC refused a source. `log` is all it said; the message starts at the first error."""

    def __init__(self, name_expressions: tuple[str, ...], arch: str, log: str):
        super().__init__(name_expressions, arch, log)  # the arguments, so that it can be pickled
        self.name_expressions, self.arch, self.log = name_expressions, arch, log

    def __str__(self) -> str:
        first = re.search(r"^.*\berror\b", self.log, re.MULTILINE)
        return f"cannot compile {', '.join(self.name_expressions)} for {self.arch}:\n{self.log[first.start() if first else 0 :]}"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A cubin, its kernels' names in it by name expression, and what the compilers said."""

    key: str  # SHA-256, hexadecimal
    names: dict[str, str]
    log: str = dataclasses.field(repr=False)
    cubin: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel takes: a thread's registers, bytes of stack and bytes stored by spills; a block's static shared bytes."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def compile_cubin(
    source: str, name_expressions: tuple[str, ...], arch: str, options: tuple[str, ...], headers: pathlib.Path
) -> Compiled:
    """A C++ text and the instantiations wanted of it, such as "sbk::kernel<64>", compiled or taken from the cache.

    arch is "sm_80", "sm_90", "sm_90a", ...; options are NVRTC's and follow FLAGS; the source may include the files of the folder
    `headers`. CompileError with the log if NVRTC refuses it. A cache that cannot be written is warned of, once.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(headers.iterdir()) if path.suffix in HEADER_SUFFIXES}
    inputs = [MAGIC.decode(), VERSION, FLAGS, SOURCE_NAME, source, name_expressions, arch, options, texts]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    path = env.cache_folder() / key
    try:
        compiled = _unpack(key, path.read_bytes())
    except OSError:
        compiled = None
    if compiled is None:
        compiled = Compiled(key, *_compile(source, name_expressions, arch, options, headers))
        _write(path, _pack(compiled))
    return compiled


def _compile(source, name_expressions, arch, options, headers) -> tuple[dict[str, str], str, bytes]:
    """(names, log, cubin), compiled."""
    program = nvrtc.createProgram(source, SOURCE_NAME, (), ())
    try:
        for name in name_expressions:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*FLAGS, f"-I{headers}", f"-arch={arch}", *options))
        except nvrtc.NVRTCError as error:
            raise CompileError(name_expressions, arch, nvrtc.getProgramLog(program)) from error
        names = {name: nvrtc.getLoweredName(program, name) for name in name_expressions}
        # NOTE: CuPy takes the cubin's last byte for a terminating zero and drops it. It is a zero, but belongs to the ELF file.
        return names, nvrtc.getProgramLog(program), nvrtc.getCUBIN(program) + b"\0"
    finally:
        nvrtc.destroyProgram(program)


def _pack(compiled: Compiled) -> bytes:
    """A cache entry: ENTRY, then the payload: a line of JSON and the cubin."""
    payload = json.dumps([compiled.names, compiled.log]).encode() + b"\n" + compiled.cubin
    return ENTRY.pack(MAGIC, len(payload), hashlib.sha256(compiled.key.encode() + payload).digest()) + payload


def _unpack(key: str, entry: bytes) -> Compiled | None:
    """What `_pack` packed; None if the entry is damaged or another key's."""
    payload = entry[ENTRY.size :]
    expected = ENTRY.pack(MAGIC, len(payload), hashlib.sha256(key.encode() + payload).digest())
    if entry[: ENTRY.size] != expected:
        return None
    head, _, cubin = payload.partition(b"\n")
    return Compiled(key, *json.loads(head), cubin)


def _write(path: pathlib.Path, entry: bytes) -> None:
    """Put an entry into the cache at once, whatever other processes do; a warning where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(entry)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        _warn_of_cache(path.parent, error.strerror)


@functools.cache
def _warn_of_cache(folder: pathlib.Path, reason: str) -> None:
    """Say once that every process will compile."""
    warnings.warn(f"compiled kernels are not kept: {folder}: {reason}; {env.CACHE} names another folder", stacklevel=4)


def resource_usage(compiled: Compiled) -> dict[str, Resources]:
    """What each kernel takes, by name expression, as ptxas reports it in the log."""
    parts = re.split(r"Compiling entry function '([^']+)'.*", compiled.log)
    reports = dict(zip(parts[1::2], parts[2::2], strict=True))

    def total(lowered: str, pattern: str) -> int:  # over the kernel and the functions it calls
        return sum(map(int, re.findall(pattern, reports[lowered])))

    return {
        name: Resources(
            registers=total(lowered, r"Used (\d+) registers"),
            stack_bytes=total(lowered, r"(\d+) bytes stack frame"),
            spill_bytes=total(lowered, r"(\d+) bytes spill stores"),
            shared_bytes=total(lowered, r"(\d+) bytes smem"),
        )
        for name, lowered in compiled.names.items()
    }


# Never unloaded: a CUDA graph may hold a kernel for as long as the process lives.
_loaded: dict[tuple[str, int], dict[str, Function]] = {}
_dynamic_shared: dict[int, int] = {}  # CUfunction -> most bytes of dynamic shared memory it may be launched with


class _Stream(NamedTuple):
    """All of a stream that CuPy's launch looks at."""

    ptr: int


def load(compiled: Compiled, device: int) -> dict[str, Function]:
    """The kernels by name expression, on CUDA device number `device`; the first time, loads them: not while a graph is captured."""
    functions = _loaded.get((compiled.key, device))
    if functions is None:
        with Device(device):
            module = Module()
            module.load(compiled.cubin)
            functions = {name: module.get_function(lowered) for name, lowered in compiled.names.items()}
        functions = _loaded.setdefault((compiled.key, device), functions)  # another thread may have been first
    return functions


def launch(function: Function, grid: int, block: int, shared_bytes: int, params: bytes, stream: int, device: int) -> None:
    """Launch a kernel whose one parameter is a struct by value, on the raw handle of a stream of `device`; does not wait.

    grid >= 1 blocks of `block` threads with shared_bytes of dynamic shared memory. NOTE: the driver copies sizeof(struct) bytes
    from `params`, whatever its length; have the source static_assert the size.
    """
    current = runtime.getDevice()
    if current != device:
        runtime.setDevice(device)
    try:
        if shared_bytes > _dynamic_shared.get(function.ptr, 0):
            driver.funcSetAttribute(function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            _dynamic_shared[function.ptr] = shared_bytes
        # An array of one element is what CuPy passes by value.
        function((grid,), (block,), (numpy.frombuffer(params, f"V{len(params)}"),), shared_bytes, _Stream(stream))
    finally:
        if current != device:
            runtime.setDevice(current)
