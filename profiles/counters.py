"""Nsight Compute's counters that are read, by name, and the limits they speak of.

`python -m sbkernels.profiles.counters` prints the range in which kernels are counted, a space, and the counters as ncu's --metrics
takes them.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Counter:
    """One line of the table. metric: ncu's name; unit: as shown, in which units ncu gives are converted; form: of the number."""

    name: str
    metric: str
    unit: str
    form: str = ".1f"


@dataclasses.dataclass(frozen=True)
class Limit:
    """A unit that can bound a kernel: the counter that shows its use in percent, and what a kernel that fills it is bound by."""

    counter: str
    bound_by: str


RANGE = "sbkernels-case"  # NVTX's name for what run_case.py runs for the profiler
ACTIVE = "avg.pct_of_peak_sustained_active"  # while a multiprocessor has work
ELAPSED = "avg.pct_of_peak_sustained_elapsed"  # of the whole time: of units that all multiprocessors share
CONFLICTS, WAVEFRONTS = "shared-memory bank conflicts", "shared-memory wavefronts"
LOADS, STORES = "loads of spilled registers", "stores of spilled registers"
OCCUPANCY = "occupancy"
COUNTERS = (
    Counter("time", "gpu__time_duration.sum", "us"),
    Counter("tensor pipe", f"sm__pipe_tensor_cycles_active.{ACTIVE}", "%"),
    Counter("special-function pipe (XU)", f"sm__inst_executed_pipe_xu.{ACTIVE}", "%"),
    Counter("FMA pipe", f"sm__pipe_fma_cycles_active.{ACTIVE}", "%"),
    Counter("issue slots", f"smsp__issue_active.{ACTIVE}", "%"),
    Counter("L2", f"lts__throughput.{ELAPSED}", "%"),
    Counter("DRAM", f"gpu__dram_throughput.{ELAPSED}", "%"),
    Counter(CONFLICTS, "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "", ",.0f"),
    Counter(WAVEFRONTS, "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", "", ",.0f"),
    Counter("registers a thread", "launch__registers_per_thread", "", ".0f"),
    Counter(OCCUPANCY, f"sm__warps_active.{ACTIVE}", "%"),
    Counter("occupancy possible", "sm__maximum_warps_per_active_cycle_pct", "%"),
    Counter(LOADS, "smsp__inst_executed_op_local_ld.sum", "", ",.0f"),
    Counter(STORES, "smsp__inst_executed_op_local_st.sum", "", ",.0f"),
)
LIMITS = (
    Limit("tensor pipe", "the matrix products"),
    Limit("special-function pipe (XU)", "the logit stage"),
    Limit("FMA pipe", "the arithmetic of the logit stage"),
    Limit("issue slots", "the number of instructions"),
    Limit("L2", "traffic between L2 and shared memory"),
    Limit("DRAM", "memory traffic"),
)
# How many warps of a scheduler wait for each reason, in every clock in which it issues; ncu's set "full" has them all.
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
NO_STALLS = ("selected", "not_selected")  # a warp that issues, and one that could
STALLS = {
    "barrier": "other warps at a barrier",
    "branch_resolving": "the target of a branch",
    "dispatch_stall": "the dispatcher",
    "drain": "stores at the end",
    "gmma": "registers of a wgmma",
    "imc_miss": "constants",
    "lg_throttle": "the queue of global and local memory",
    "long_scoreboard": "global or local memory, or L2",
    "math_pipe_throttle": "a busy arithmetic pipe",
    "membar": "a fence",
    "mio_throttle": "the queue of shared memory and special functions",
    "no_instruction": "instructions to be fetched",
    "short_scoreboard": "shared memory or a special function",
    "sleeping": "a sleep",
    "wait": "an instruction of fixed latency",
}

if __name__ == "__main__":
    print(RANGE, ",".join(counter.metric for counter in COUNTERS))
