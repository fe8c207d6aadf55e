"""`sbk info` and `sbk explain`: what there is, and what would run a problem, without running anything."""

from __future__ import annotations

import os

from rich.markup import escape

from .. import config as configs
from .. import dispatch, env, environment, registry
from ..problem import DTYPES, MAX_HEAD_DIM, Problem
from .shared import check_device, out, table


def info(arguments) -> int:
    """Devices, versions, backends with reasons, environment variables."""
    device = check_device(arguments.device)
    out.print(f"[bold]CPU[/bold] {escape(environment.cpu_name())}")
    for index, gpu in enumerate(environment.gpus()):
        memory = gpu["memory"] / 2**30
        out.print(f"[bold]cuda:{index}[/bold] {gpu['name']}, sm {gpu['capability']}, {gpu['sms']} SMs, {memory:.0f} GiB")
    if not environment.gpus():
        out.print("[bold]CUDA[/bold] no device")
    out.print("[bold]versions[/bold] " + ", ".join(f"{name} {version}" for name, version in environment.versions().items()))
    rows = table(f"backends on {device}, in order of preference", "backend", "dtypes", "notes")
    for name in registry.names():
        backend, reason = registry.try_load(name)
        taken = []
        for dtype in DTYPES if backend else ():
            problem = Problem(1, 1, 1, 64, 64, 64, 64, dtype, device)
            why = backend.unsupported(problem)
            reason = reason or why or backend.slow(problem)
            taken += [] if why else [dtype]
        rows.add_row(name, ", ".join(taken) or "-", escape(reason or ""))
    out.print(rows)
    variables = table("environment variables", "name", "value", "meaning", "default")
    for name, (meaning, default) in env.VARIABLES.items():
        variables.add_row(name, escape(os.environ.get(name, "")), meaning, default)
    out.print(variables)
    return 0


def explain(arguments) -> int:
    """Backend, config with its provenance, and kernels of both passes of a problem, and every other backend's reason."""
    device = check_device(arguments.device)
    if arguments.dtype not in DTYPES:
        raise ValueError(f"--dtype {arguments.dtype!r}: expected one of {', '.join(DTYPES)}")
    kv_heads = arguments.kv_heads or arguments.heads
    queries = arguments.queries or arguments.keys
    head_dim, value_dim = arguments.head_dim, arguments.value_dim or arguments.head_dim
    for name in ("batch", "heads", "keys"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    if kv_heads < 1 or arguments.heads % kv_heads:
        raise ValueError(f"--kv-heads {kv_heads}: expected a divisor of --heads {arguments.heads}")
    if not 1 <= queries <= arguments.keys:
        raise ValueError(f"--queries {queries}: expected 1 to --keys {arguments.keys}")
    for name, dim in (("head-dim", head_dim), ("value-dim", value_dim)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"--{name} {dim}: expected 1 to {MAX_HEAD_DIM}")
    problem = Problem(
        arguments.batch, arguments.heads, kv_heads, queries, arguments.keys, head_dim, value_dim, arguments.dtype, device,
        layout="thd" if arguments.varlen else "bhnd", varlen=arguments.varlen,
        tokens=arguments.batch * arguments.keys if arguments.varlen else 0, attend_current=arguments.attend_current,
    )  # fmt: skip
    choices = dispatch.choose_both(problem, arguments.backend)
    for p, choice in zip((problem, problem.reversed()), choices, strict=True):
        out.print(f"[bold]{escape(str(p))}[/bold]")
        out.print(f"  backend {choice.backend.name} (asked for by: {choice.asked_by})")
        values = " ".join(f"{name}={value}" for name, value in configs.to_dict(choice.config).items())
        out.print(f"  config  {values}  ({choice.provenance})")
        kernels = choice.backend.kernels(p, choice.config)
        if kernels is not None:
            out.print(f"  kernels {escape(kernels)}")
    for name, reason in dispatch.reasons(problem).items():
        if name != choices[0].backend.name:
            backend, _ = registry.try_load(name)
            reason = reason or backend.slow(problem) or also_runs(backend, problem)
            out.print(f"  not {name}: {escape(reason)}")
    return 0


def also_runs(backend, problem: Problem) -> str:
    """What there is to say of a backend that was not chosen although it can run a problem."""
    tuned = dispatch.tuned_ms(backend, (problem, problem.reversed()))
    return "can run it; comes later in the order of preference" if tuned is None else f"can run it: {tuned[0]:.4g} ms tuned"
