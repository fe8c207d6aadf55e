"""`sbk`: argument parsing and exit statuses. 0 fine, 1 a bound was exceeded, 2 the request cannot be met, 130 interrupted."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import signal
import sys

OK, EXCEEDED, REFUSED, INTERRUPTED = 0, 1, 2, 130
MODULES = {"info": "explain"}  # where a command is, if not in the module of its name


def default_device() -> str:
    """cuda where there is one, else cpu, where Triton's kernels then run through its interpreter."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    # Has to be said before triton is first imported; who set it to 0 keeps it.
    if "triton" not in sys.modules and importlib.util.find_spec("triton"):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return "cpu"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="sbk", description="Kernel-engineering workbench for stick-breaking attention.")
    commands = root.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="devices, versions, backends and why not, environment variables")

    explain = commands.add_parser("explain", help="which backend and config a problem would run with, without running it")
    shape = explain.add_argument_group("problem")
    for name, default in (("batch", 1), ("heads", 16), ("queries", 0), ("keys", 4096), ("head-dim", 128)):
        shape.add_argument(f"--{name}", type=int, default=default, metavar="N")
    shape.add_argument("--kv-heads", type=int, metavar="N", help="default: as many as --heads")
    shape.add_argument("--value-dim", type=int, metavar="N", help="default: --head-dim")
    shape.add_argument("--dtype", default="bfloat16")
    shape.add_argument("--varlen", action="store_true", help="--batch packed sequences of at most --keys tokens")
    shape.add_argument("--attend-current", action="store_true")
    explain.add_argument("--backend", help="as the argument backend= of a call")

    compare = commands.add_parser("compare", help="errors and times of every backend beside the reference and softmax attention")
    compare.add_argument("--input", metavar="FILE", help="take q, k, v (and cu_seqlens) from a safetensors file only")

    bench = commands.add_parser("bench", help="speed on sets of problems, beside peers and beside what the machine can do")
    bench.add_argument("--set", help="problems: training (default on a GPU), varlen, gqa, wide, decode, overhead, step, cpu")
    bench.add_argument("--case", action="append", metavar="TEXT", help="only problems whose name holds this (repeatable)")
    bench.add_argument("--beside", action="append", metavar="NAME", help="only this contender beside ours (repeatable), or none")
    bench.add_argument("--minutes", type=float, metavar="M", help="begin no problem after that")
    bench.add_argument("--sustained", type=float, metavar="SECONDS", help="also each alone, over and over: time, clock, power")
    bench.add_argument("--clock", type=float, metavar="MHZ", help="of the SMs: turns below do not count; default: half the highest")
    bench.add_argument("--against", metavar="FILE", help="hold the result against one of --json; exit status 1 when SLOWER")
    bench.add_argument("--readme", action="store_true", help="instead, make README.md's tables anew from tests/records")

    verify = commands.add_parser("verify", help="hold every backend against the float64 reference")
    verify.add_argument("--dtype", action="append", help="only this dtype (repeatable)")
    verify.add_argument("--quick", action="store_true", help="the small set of cases")
    verify.add_argument("--details", action="store_true", help="print every check of every backend")
    verify.add_argument("--html", metavar="FILE", help="write the report as a section of an HTML page")
    verify.add_argument("--mutants", action="store_true", help="instead, see that every planted wrong implementation is caught")
    verify.add_argument(
        "--check-record", nargs="*", metavar="FILE", help="only say whether records describe the present sources; default: all"
    )

    fuzz = commands.add_parser("fuzz", help="random problems against the reference; failures are made small and remembered")
    fuzz.add_argument("--seeds", type=int, default=300, metavar="N", help="how many problems; default: 300")
    fuzz.add_argument("--first-seed", type=int, default=0, metavar="N")
    fuzz.add_argument("--minutes", type=float, metavar="M", help="for each backend at most")
    fuzz.add_argument("--case", metavar="TEXT", help="run one problem, as a failure prints it")
    fuzz.add_argument("--corpus", metavar="FILE", help="where failures go; default: the one pytest replays, tests/data/fuzz.txt")

    sanitize = commands.add_parser("sanitize", help="compute-sanitizer over a fixed set of problems, and over planted bugs")
    sanitize.add_argument("--tool", action="append", help="memcheck, racecheck, initcheck or synccheck (repeatable); default: all")
    sanitize.add_argument("--processes", type=int, default=1, metavar="N", help="of backends and tools at a time")

    stress = commands.add_parser("stress", help="the same bits a thousand times under load; graph replay, streams, devices")
    stress.add_argument("--runs", type=int, default=1000, metavar="N", help="of each problem, forward and backward; default: 1000")

    tune = commands.add_parser("tune", help="find the fastest configs for this machine and keep them in the tuning database")
    tune.add_argument("--set", help="problems: training (default on a GPU) or small (default on a CPU)")
    tune.add_argument("--shape", action="append", metavar="B,H,N,D", help="this problem instead (repeatable); H/Hk, M/N, D/Dv")
    tune.add_argument("--dtype", help="of --shape; default: bfloat16, float32 on a CPU")
    tune.add_argument("--attend-current", action="store_true", help="of --shape")
    tune.add_argument("--no-skip", action="store_true", help="of --shape: without early stop (skip_below=0)")
    tune.add_argument("--direction", choices=("forward", "backward", "both"), default="both")
    tune.add_argument("--budget", type=float, metavar="SECONDS", help="of wall time for all; default: until all was tried")
    tune.add_argument("--strategy", choices=("exhaustive", "random", "guided"), default="exhaustive")
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument("--gpus", metavar="all", help="every GPU of this machine, each with its own worker, on one database")
    tune.add_argument("--processes", type=int, metavar="N", help="that compile; default: as many as there are processors")
    tune.add_argument("--replay", metavar="FILE", help="only try the strategies on the full measurements of a database or export")

    db = commands.add_parser("db", help="the tuning database: what is in it, from file to file, its health")
    db.add_argument("action", choices=("show", "history", "check", "export", "import", "merge", "prune"))
    db.add_argument("files", nargs="*", metavar="FILE", help="export: where to; import: exports; merge: other databases")
    db.add_argument("--only", choices=("served", "medians"), help="export without samples: what lookups need, or all trials")

    profile = commands.add_parser("profile", help="one case under Nsight, and what its counters say")
    profile.add_argument("case", nargs="?", metavar="CASE", help="a name of --list, or a shape B,H,N,D; H/Hk, M/N, D/Dv")
    profile.add_argument("--list", action="store_true", help="only show the named cases")
    profile.add_argument("--tool", choices=("ncu", "nsys"), default="ncu")
    profile.add_argument("--backend", help="as the argument backend= of a call")
    profile.add_argument("--direction", choices=("forward", "backward", "both"), default="both")
    profile.add_argument("--dtype", default="bfloat16")
    profile.add_argument("--report", metavar="FILE", help="the tool's report; default: in the folder of SBKERNELS_CACHE")
    profile.add_argument("--read", metavar="FILE", help="instead, read a report of ncu or nsys, or the CSV it was printed as")

    report = commands.add_parser("report", help="stored results as one HTML page that needs no network")
    report.add_argument("files", nargs="*", metavar="FILE", help="records, exports or databases; default: those of sbkernels")
    report.add_argument("--output", metavar="FILE", default="report.html", help="the page; default: report.html")

    softplus = commands.add_parser("softplus", help="errors and throughput of each variant of softplus2 and of 1 - beta")
    for command in (bench, compare, verify, fuzz, sanitize, stress, tune):
        command.add_argument("--backend", action="append", help="only this backend (repeatable)")
    for command in (verify, fuzz):
        command.add_argument("--processes", type=int, default=1, metavar="N", help="worker processes; on a GPU they mostly compile")
    for command in (verify, fuzz, sanitize, stress):
        command.add_argument("--record", metavar="FILE", help="store the result, with environment and source hashes")
    for command in (bench, compare, softplus, profile):
        command.add_argument("--json", metavar="FILE", help="store the rows, with environment and source hashes")
    for command in (tune, db):
        command.add_argument("--db", metavar="FILE", help="the database; default: SBKERNELS_TUNING_DB")
    for command in commands.choices.values():
        command.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    return root


@contextlib.contextmanager
def sigterm_interrupts():
    """SIGTERM, which schedulers and `timeout` send, ends a command as Ctrl-C does: what it has by then is kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `sbk` script; returns the exit status."""
    arguments = parser().parse_args(argv)
    from rich.console import Console

    console = Console(highlight=False, stderr=True)
    try:
        arguments.device = arguments.device or default_device()
        module = importlib.import_module(f".{MODULES.get(arguments.command, arguments.command)}", __package__)
        with sigterm_interrupts():
            return getattr(module, arguments.command)(arguments)
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        console.print(f"[red]sbk {arguments.command}:[/red]", end=" ")
        console.print(str(error), markup=False, soft_wrap=True)
        return REFUSED
