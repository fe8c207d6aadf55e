"""Tuning in a job of several processes (torchrun): each rank tunes its share, and all have all records in the end.

On a machine one rank writes the database that lookups ask; ranks measure into files of their own beside it, so that no two write
one file, and records travel as text.
"""

from __future__ import annotations

import os
import pathlib

import torch
import torch.distributed as dist

from .session import Outcome, Session
from .store import Store
from .tune import Task
from .tune import tune as tune_here


def world() -> int:
    """How many processes the job has, as torchrun says; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(device: str) -> str:
    """The device of this rank: its own GPU where each has one."""
    if not device.startswith("cuda") or world() == 1:
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def tune(wanted: list[Task], database: pathlib.Path, session: Session, devices: list[str], **options) -> list[Outcome]:
    """As tune.tune, of this rank's share of the tasks; then every machine's database gets every rank's trials.

    The same on all ranks: the task list and the order of its shares. Starts a gloo process group where there is none.
    """
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    own = pathlib.Path(f"{database}.rank{rank}")
    outcomes = tune_here(wanted[rank::size], own, session, devices, **options)
    with Store(own) as store:
        text = store.text()
    gathered: list[str | None] = [None] * size
    dist.all_gather_object(gathered, text)
    if int(os.environ.get("LOCAL_RANK", rank)) == 0:
        with Store(database) as store:
            for each in gathered:
                store.take_in_text(each, "a rank's records")
    dist.barrier()
    if ours:
        dist.destroy_process_group()
    return outcomes
