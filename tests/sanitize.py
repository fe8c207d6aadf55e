"""compute-sanitizer over ragged problems, forward and backward: python tests/sanitize.py cuda ptx --tool racecheck [--record FILE].

Every tensor gets an allocation of its own, so that a byte beyond one is seen. Exit status 1 if anything was found.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys

CASES = [
    dict(M=1, N=1), dict(M=1, N=2, attend_current=True), dict(M=3, N=70), dict(M=63, N=65, attend_current=True),
    dict(M=129, N=129, skip=True), dict(M=200, N=333, D=64, Dv=64), dict(M=150, N=150, D=50, Dv=80), dict(M=97, N=97, D=80, Dv=50),
    dict(M=130, N=257, H=6, Hk=2, D=128, Dv=128, layout="packed"), dict(M=90, N=100, B=2, D=24, Dv=16, layout="bnhd"),
    dict(M=70, N=131, D=256, Dv=192), dict(lengths=(33, 0, 1, 64, 130), H=4, Hk=2, D=128, Dv=64, skip=True),
    dict(regime="std30", M=190, N=190, D=64, Dv=64, skip=True),
    # Tiles that Hopper's kernels load whole, pair by pair, and that no query visits:
    dict(M=256, N=256, H=4, Hk=2, D=128, Dv=128),
    dict(B=2, M=384, N=384, D=64, Dv=64, attend_current=True, layout="bnhd", skip=True),
    dict(regime="std30", M=256, N=256, H=2, Hk=1, D=64, Dv=64, skip=True),
    dict(B=2, M=301, N=301, H=4, Hk=2, D=128, Dv=96, layout="bnhd"), dict(regime="std30", M=100, N=1000, D=64, Dv=64, skip=True),
]  # fmt: skip


def run(backend: str) -> None:
    """All cases on one backend, in this process."""
    import torch

    from sbkernels import use_backend
    from sbkernels.verify import inputs
    from sbkernels.verify.run import attend

    with use_backend(backend):
        for case in CASES:
            attend(inputs.make(inputs.Case(**case), torch.bfloat16, "cuda:0"))
    torch.cuda.synchronize()


def check(backend: str, sanitizer: str, tool: str) -> dict:
    """One backend under a tool of compute-sanitizer: how many errors, and what was said of the first."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--run", backend]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    errors = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", result.stdout + result.stderr)
    found = {
        "backend": backend,
        "tool": tool,
        "cases": len(CASES),
        "errors": int(errors.group(1)) if errors else None,
        "exit": result.returncode,
    }
    if found["errors"] != 0 or result.returncode:
        found["output"] = (result.stdout + result.stderr)[-4000:]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", default=["cuda", "ptx", "triton"])
    parser.add_argument("--record", metavar="FILE", help="store the result as JSON, with environment and source hashes")
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "initcheck", "synccheck"), default="memcheck")
    parser.add_argument("--run", metavar="BACKEND", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run)
        return 0
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    rows = [check(backend, sanitizer, arguments.tool) for backend in arguments.backends]
    for row in rows:
        print(f"{row['tool']}, {row['backend']}: {row['errors']} errors over {row['cases']} cases, exit status {row['exit']}")
        print(row.get("output", ""), end="")
    if arguments.record:
        from sbkernels.verify import record

        record.write(arguments.record, arguments.tool, rows)
    return int(any(row["errors"] != 0 or row["exit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
