"""Compile a kernel launch for a GPU that need not be there and report what it takes."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile

import torch
from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARP_SIZE = 32
ALIGNMENT = 16  # pointers and integers that are multiples of it are specialised on, as the JIT does
POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers and bytes of spills a thread, bytes of shared memory a program.

    async_copies: instructions that copy 16 bytes to shared memory while others run.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    async_copies: int
    cubin: bytes = dataclasses.field(repr=False)


def signature(kernel, arguments: dict) -> tuple[dict, dict, dict]:
    """(types, constants, attributes) the JIT would give these arguments; TypeError unless they are the kernel's, all of them."""
    if arguments.keys() != set(kernel.arg_names):
        raise TypeError(f"{kernel.__name__}: arguments that differ: {sorted(arguments.keys() ^ set(kernel.arg_names))}")
    types, constants, attributes = {}, {}, {}
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constexprs or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name] = POINTER_TYPES[value.dtype]
            aligned = True  # the allocator's guarantee
        elif isinstance(value, float):
            types[name], aligned = "fp32", False
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % ALIGNMENT == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", ALIGNMENT]]
    return types, constants, attributes


def compile_launch(launch, capability: int) -> Resources:
    """Compile a `Launch` (sbkernels.backends.triton_) for compute capability 80, 90, ...; raises what the compilers raise."""
    types, constants, attributes = signature(launch.kernel, launch.arguments)
    compiled = triton_compile(
        ASTSource(launch.kernel, types, constants, attributes),
        target=GPUTarget("cuda", capability, WARP_SIZE),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    report, cubin = assemble(compiled.asm["ptx"], capability)
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill stores", report))),
        shared_bytes=compiled.metadata.shared,
        async_copies=compiled.asm["ptx"].count("cp.async.cg.shared.global"),
        cubin=cubin,
    )


def assemble(ptx: str, capability: int) -> tuple[str, bytes]:
    """(ptxas -v report, cubin) of a PTX module, with the assembler Triton brings."""
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "kernel.ptx"), os.path.join(folder, "kernel.cubin")
        with open(source, "w") as file:
            file.write(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", source, "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"ptxas failed for {architecture}:\n{result.stderr}")
        with open(target, "rb") as file:
            return result.stderr, file.read()
