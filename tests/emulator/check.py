"""Runs csrc's kernels on the CPU, forward and backward, and holds them against the reference.

    python tests/emulator/check.py                    the harness's cases, each backend variant, one schedule each
    python tests/emulator/check.py --seeds 500        random problems on random schedules and numbers of multiprocessors
    python tests/emulator/check.py --job TEXT         one of them again, as a failure was printed; several may be given

A job is "SEED:EAGERNESS:MULTIPROCESSORS cuda [(variant)] float16 Case(...)": see `schedule` in emulator.cpp. The kernels are built
first, with g++; --csrc takes them from another folder.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile

import backend
import torch
from rich import progress
from rich.console import Console

import build

SIZE = "emulated"
EAGERNESS = (2, 20, 50, 80, 100)  # percent


def jobs_of_harness() -> list[str]:
    """Every case of `sbk verify` in float16, whichever kernels take it, and the portable ones on those that Hopper's take."""
    from sbkernels.verify import inputs

    rng = random.Random(0)
    cases = inputs.cases(large=False) + inputs.small_cases()
    found = [f"cuda float16 {case}" for case in cases]
    found += [f"cuda (portable) float16 {case}" for case in cases if max(case.lengths or (case.N,)) >= 128]
    return [f"{schedule(rng)} {job}" for job in found]


def jobs_of_seeds(seeds: range) -> list[str]:
    from sbkernels.verify import fuzz

    fuzz.SIZES[SIZE] = (600, 2**19)
    return [f"{schedule(random.Random(seed))} cuda float16 {fuzz.draw(seed, SIZE)}" for seed in seeds]


def schedule(rng: random.Random) -> str:
    return f"{rng.randrange(10**6)}:{rng.choice(EAGERNESS)}:{rng.choice((1, 2, 3, 5))}"


def start(module: pathlib.Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    torch.set_num_threads(1)
    start.extension = backend.install(module)


def parse(job: str) -> tuple[int, int, int, str, object]:
    """(seed, eagerness, multiprocessors, variant, case); ValueError in words."""
    from sbkernels.verify import fuzz

    how, _, text = job.partition(" ")
    try:
        seed, eagerness, multiprocessors = map(int, how.split(":"))
    except ValueError:
        raise ValueError(f"--job {job!r}: expected SEED:EAGERNESS:MULTIPROCESSORS before the backend") from None
    _, variant, dtype, case = fuzz.from_text(text)
    if dtype != "float16":
        raise ValueError(f"--job {job!r}: expected float16, which the kernels are built for")
    return seed, eagerness, multiprocessors, variant, case


def failure(job: str) -> str:
    """What is wrong with a job's results; empty if nothing."""
    from sbkernels.verify import inputs, run

    seed, eagerness, multiprocessors, variant, case = parse(job)
    start.extension.schedule(seed, eagerness)
    backend.set_multiprocessors(multiprocessors)
    x = inputs.make(case, torch.float16, "cpu")
    try:
        with run.variant_of(backend.loaded(), variant, run.problem_of(x)):
            findings = run.judge(run.attend(x), run.expectation(x))
    except RuntimeError as error:
        return f"{job}\n  {error}"
    wrong = [str(finding) for finding in findings if not finding.ok]
    return "\n  ".join([job, *wrong]) if wrong else ""


def check(jobs: list[str], module: pathlib.Path, most: int = 5) -> tuple[int, list[str]]:
    """(how many were run, the first failures), in as many processes as there are cores; Ctrl-C ends it with what there is."""
    spawn = multiprocessing.get_context("spawn")
    done, failures = 0, []
    pool = concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn, start, (module,))
    try:
        for found in progress.track(pool.map(failure, jobs, chunksize=4), "checking", len(jobs), console=Console(stderr=True)):
            done += 1
            failures += [found] if found else []
            if len(failures) == most:
                break
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    pool.shutdown(cancel_futures=True)
    return done, failures


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="random problems 0 to N - 1")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="count from this one on")
    parser.add_argument("--job", action="append", default=[], metavar="TEXT")
    parser.add_argument("--csrc", type=pathlib.Path, default=build.CSRC, metavar="FOLDER")
    parser.add_argument("--widths", type=int, nargs="+", default=build.WIDTHS, metavar="D", help="head dims up to these")
    given = parser.parse_args(arguments)
    if given.seeds < 0 or given.first < 0:
        parser.error(f"--seeds {given.seeds} --first {given.first}: expected 0 or more")
    if not (given.csrc / "instance.cu").is_file():
        parser.error(f"--csrc {given.csrc}: expected a folder with the sources of csrc")
    if not set(given.widths) <= set(build.WIDTHS):
        parser.error(f"--widths {given.widths}: expected some of {build.WIDTHS}")
    try:
        list(map(parse, given.job))
    except ValueError as error:
        parser.error(str(error))
    module = build.build(pathlib.Path(tempfile.gettempdir()) / "sbkernels-emulator", given.csrc.resolve(), tuple(given.widths))
    jobs = given.job or jobs_of_seeds(range(given.first, given.first + given.seeds)) or jobs_of_harness()
    jobs = [job for job in jobs if max(parse(job)[-1].D, parse(job)[-1].Dv) <= max(given.widths)]
    done, failures = check(jobs, module)
    print(*failures, f"{done} jobs, {len(failures)} failed", sep="\n")
    return bool(failures) or done < len(jobs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
