"""Properties of the way it is run: repeated, in little memory, captured in a graph, on several streams and devices."""

from __future__ import annotations

import os
from unittest import mock

import torch

from ... import env
from ..tolerance import OUTPUTS
from .lab import Lab, NotHere, Result, apart, check, largest, same

STREAMS = 3
ROUNDS = 4  # calls on each stream, so that they overlap


def equal(what: str, found, expected) -> Result:
    """Bit-equal, output by output."""
    return [same(f"{what}: {name}", a, b) for name, a, b in zip(OUTPUTS, found, expected, strict=True)]


def problems(lab: Lab, count: int, B: int = 1):
    """q, k, v, dout, dremainder of as many problems of one shape."""
    drawn = (lab.inputs("critical", seed=seed, B=B, H=2, Hk=1) for seed in range(count))
    return [(x.q, x.k, x.v, x.dout, x.dremainder) for x in drawn]


def need_gpu(lab: Lab) -> None:
    if not lab.device.startswith("cuda"):
        raise NotHere(f"a matter of GPUs, this is {lab.device}")


@check
def determinism(lab: Lab) -> Result:
    """The same call gives the same bits, also after another one of its shape."""
    one, other = problems(lab, 2)
    first = lab.gradients(*one)
    lab.gradients(*other)
    return equal("again", lab.gradients(*one), first)


@check
def workspace(lab: Lab) -> Result:
    """A workspace that holds nothing changes the order of sums alone."""
    (one,) = problems(lab, 1, B=2)
    plenty = lab.gradients(*one)
    with mock.patch.dict(os.environ, {env.WORKSPACE: "1"}):
        little = lab.gradients(*one)
    allowed = 2 * lab.u + 2 * lab.e
    return [(name, apart(a, b) / largest(a), allowed) for name, a, b in zip(OUTPUTS, plenty, little, strict=True)]


@check
def graph_replay(lab: Lab) -> Result:
    """A captured forward and backward, replayed with other inputs in the same memory, gives what a call on those gives."""
    need_gpu(lab)
    held, other = problems(lab, 2)
    expected = [lab.gradients(*x) for x in (held, other)]
    first = [x.clone() for x in held]
    side = torch.cuda.Stream(lab.device)
    side.wait_stream(torch.cuda.current_stream(lab.device))
    with torch.cuda.stream(side):  # kernels are compiled, and memory is taken, before the capture
        lab.gradients(*held)
    torch.cuda.current_stream(lab.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lab.gradients(*held)
    results = []
    for what, new, exact in (("other inputs", other, expected[1]), ("first inputs", first, expected[0])):
        for target, source in zip(held, new, strict=True):
            target.copy_(source)
        graph.replay()
        results += equal(what, found, exact)
    return results


@check
def streams(lab: Lab) -> Result:
    """Calls that overlap on several streams give what they give one after the other."""
    need_gpu(lab)
    several = problems(lab, STREAMS)
    expected = [lab.gradients(*x) for x in several]
    torch.cuda.synchronize(lab.device)
    running = [torch.cuda.Stream(lab.device) for _ in several]
    found = [[] for _ in several]
    for _ in range(ROUNDS):
        for stream, x, results in zip(running, several, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(lab.gradients(*x))
    torch.cuda.synchronize(lab.device)
    return [line for i, results in enumerate(found) for result in results for line in equal(f"stream {i}", result, expected[i])]


@check
def devices(lab: Lab) -> Result:
    """A call on tensors of another device than the current one runs there, and gives what it gives here."""
    need_gpu(lab)
    others = [i for i in range(torch.cuda.device_count()) if f"cuda:{i}" != lab.device]
    if not others:
        raise NotHere("there is one CUDA device")
    (here,) = problems(lab, 1)
    expected = lab.gradients(*here)
    results = []
    for other in others:
        there = lab.gradients(*(x.to(f"cuda:{other}") for x in here))
        for name, a, b in zip(OUTPUTS, there, expected, strict=True):
            allowed = (2 * lab.u + 2 * lab.e) * largest(b)  # another device may have another order of sums
            results.append((f"cuda:{other}: {name}", apart(a.to(lab.device), b), allowed))
    return results
