"""Builds csrc's kernels for the CPU: `sbkernels._C` on the machine of emulator.h, with g++."""

import concurrent.futures
import hashlib
import os
import pathlib
import re
import subprocess
import sysconfig
import tempfile

import pybind11

HERE = pathlib.Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
WIDTHS = (64, 128, 192, 256)
SUFFIXES = (".cuh", ".cu", ".h", ".cpp")
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-w", "-DSBK_SM90A"]
FUNCTION = re.compile(r"^(?:template <[^\n]*>\s+)?SBK_FN [^\n]*?\{", re.M)
EMULATED = {
    "instructions.cuh": "instructions.inc",
    "hopper.cuh": "hopper.inc",
}  # files with functions around PTX: who does what they do


def for_cpu(name: str, text: str) -> str:
    """A source of csrc without PTX."""
    text = re.sub(r'asm volatile\(""[^;]*;', "", text)  # says something to nvcc alone
    text = re.sub(r"extern __shared__ __align__\(\w+\) ((?:unsigned )?char) (\w+)\[\];", r"\1* \2 = (\1*)emulator::shared();", text)
    first, wgmma = None, re.search(r"^#define SBK_C4.*?^#undef SBK_C128\n", text, re.M | re.S)
    if wgmma:
        text = text.replace(wgmma.group(), "")
    at = 0
    while match := FUNCTION.search(text, at):
        end, depth = match.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if re.search(r"\basm\b|__cvta", text[match.start() : end]):
            first = match.start() if first is None else first
            text, at = text[: match.start()] + text[end:], match.start()
        else:
            at = match.end()
    if first is not None:
        text = text[:first] + f'#include "{EMULATED[name]}"\n' + text[first:]
    assert "asm" not in re.sub(r"//[^\n]*", "", text), name
    return text


def build(folder: pathlib.Path, csrc: pathlib.Path = CSRC, widths=WIDTHS) -> pathlib.Path:
    """The module's file, in float16, below `folder`, where what does not change stays compiled; RuntimeError with what g++ says."""
    sources = {path.name: for_cpu(path.name, path.read_text()) for path in sorted(csrc.iterdir()) if path.suffix in SUFFIXES}
    sources |= {path.name: path.read_text() for path in sorted(HERE.iterdir()) if path.is_file()}
    units = {unit: (unit, []) for unit in ("bindings.cpp", "tensor_map.cpp", "emulator.cpp", "launcher.cpp")}
    units |= {f"instance {width}": ("instance.cu", ["-DSBK_DTYPE=half", f"-DSBK_BLOCK_D={width}"]) for width in widths}
    kernels = [text for name, text in sources.items() if name.endswith((".cuh", ".cu"))]
    others = [text for name, text in sources.items() if not name.endswith((".cuh", ".cu"))]
    objects = {}
    with tempfile.TemporaryDirectory() as generated:
        for name, text in sources.items():
            (pathlib.Path(generated) / name).write_text(text)
        includes = [
            f"-I{generated}",
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
            f"-include{generated}/emulator.h",
        ]

        def compile_unit(unit: str) -> None:
            name, defines = units[unit]
            target = objects[unit]
            if not target.exists():
                part = target.with_suffix(f".{os.getpid()}")
                run(["g++", *FLAGS, *defines, *includes, "-x", "c++", "-c", f"{generated}/{name}", "-o", str(part)])
                part.replace(target)

        folder.mkdir(parents=True, exist_ok=True)
        for unit in units:
            made_of = others + (kernels if unit.startswith("instance") else []) + [unit, str(FLAGS)]
            objects[unit] = folder / f"{unit.replace(' ', '-')}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.o"
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, reversed(units)))  # the longest first
    made_of = hashlib.sha256(repr(list(objects.values())).encode()).hexdigest()[:16]
    module = folder / made_of / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        part = module.with_suffix(f".{os.getpid()}")
        run(["g++", "-shared", "-o", str(part), *map(str, objects.values())])
        part.replace(module)
    return module


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{result.stderr[:6000]}")
