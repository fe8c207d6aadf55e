"""What a result was obtained on: machine, versions, git state, and hashes of the sources that decide what kernels compute."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
from datetime import datetime, timezone

import torch

from . import registry

PACKAGES = ("sbkernels", "torch", "triton", "cupy-cuda13x", "numpy")


def cpu_name() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def nvidia_smi(query: str) -> list[str]:
    """One line per GPU of an nvidia-smi query; empty where there is none."""
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.strip().splitlines() if result.returncode == 0 else []


def gpus() -> list[dict]:
    """Name, capability, multiprocessors and memory of every CUDA device."""
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        capability = f"{p.major}.{p.minor}"
        found.append({"name": p.name, "capability": capability, "sms": p.multi_processor_count, "memory": p.total_memory})
    return found


def versions() -> dict[str, str]:
    """Installed versions of the packages results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def git_state() -> str:
    """Commit of the working tree, with + for uncommitted changes; empty outside of a checkout."""
    folder = pathlib.Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)  # noqa: E731
        head, status = run("rev-parse", "--short", "HEAD"), run("status", "--porcelain")
    except OSError:
        return ""
    return "" if head.returncode else head.stdout.strip() + ("+" if status.stdout.strip() else "")


def source_hash(backend) -> str:
    """Hash of the files that decide what a backend computes."""
    digest = hashlib.sha256()
    for path in sorted(map(pathlib.Path, backend.sources()), key=lambda path: path.name):
        digest.update(path.name.encode() + b"\\0" + path.read_bytes() + b"\\0")
    return digest.hexdigest()[:16]


def source_hashes() -> dict[str, str]:
    """source_hash of every backend that loads here."""
    loaded = {name: registry.try_load(name)[0] for name in registry.names()}
    return {name: source_hash(backend) for name, backend in loaded.items() if backend is not None}


def describe() -> dict:
    """Everything of this module, for a record."""
    driver = nvidia_smi("driver_version")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "gpus": gpus(),
        "driver": driver[0] if driver else None,
        "sm_clock": nvidia_smi("clocks.sm,clocks.max.sm"),
        "versions": versions(),
        "git": git_state(),
        "sources": source_hashes(),
    }
