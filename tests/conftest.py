"""Where there is no GPU, Triton's kernels run through its interpreter; that has to be said before triton is first imported."""

import os
import pathlib
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nobody's tuned configs: tests that want some make their own.
os.environ["SBKERNELS_TUNING_DB"] = str(pathlib.Path(tempfile.gettempdir()) / "sbkernels-tests-have-no-tuning-database")


def pytest_configure(config):
    """Nothing is timed but with --benchmark-only; otherwise tests/benchmarks run once, to see that they do."""
    option = config.option
    if hasattr(option, "benchmark_only") and not (option.benchmark_only or option.benchmark_enable):
        option.benchmark_disable = True
