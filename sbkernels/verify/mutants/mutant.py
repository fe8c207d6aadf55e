"""What a mutant is, and how one takes the place of a registered backend.

A mutant is either a wrapper of the backend's forward or backward, or a switch inside of it. Switches exist in a test build alone:
a copy of the backend's sources in which each expression of the table reads `(wrong if MUTANT == number else right)`. With MUTANT =
0 the copy computes what the sources do: the control that goes with every score.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable
from unittest import mock

from ... import registry


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One wrong implementation: its name, and in a line what is wrong.

    wrappers: by direction, functions (right, ...) that answer in place of the backend's method `right(...)`.
    switches: (file, right expression, wrong expression), each in place of the only such text of a file of the backend's sources.
    variant: the backend's variant it shows in.
    """

    name: str
    what: str
    wrappers: dict[str, Callable] = dataclasses.field(default_factory=dict)
    switches: tuple[tuple[str, str, str], ...] = ()
    variant: str = ""


def with_switches(text: str, switches: list[tuple[int, str, str]], where: str) -> str:
    """Source text with switches (number, right, wrong) built in; ValueError unless each `right` is there once, alone."""
    by_right: dict[str, list[tuple[int, str]]] = {}
    for number, right, wrong in switches:
        by_right.setdefault(right, []).append((number, wrong))
    places = []
    for right, choices in by_right.items():
        if text.count(right) != 1:
            raise ValueError(f"{where} has {text.count(right)} times {right!r}: expected once; the table of mutants is out of date")
        chain = "".join(f"({wrong}) if MUTANT == {number} else " for number, wrong in choices)
        places.append((text.index(right), right, f"({chain}{right})"))
    result, end = [], 0
    for begin, right, switch in sorted(places):
        if begin < end:
            raise ValueError(f"{where}: the switch of {right!r} overlaps another")
        result += [text[end:begin], switch]
        end = begin + len(right)
    return "".join([*result, text[end:]])


def sources_with_switches(paths: list[pathlib.Path], table: list[Mutant]) -> dict[str, str]:
    """File name -> text of the test build; mutants are numbered from 1 as in the table."""
    by_file = {path.name: [] for path in paths}
    for number, mutant in enumerate(table, 1):
        for file, right, wrong in mutant.switches:
            by_file[file].append((number, right, wrong))
    return {path.name: with_switches(path.read_text(encoding="utf-8"), by_file[path.name], path.name) for path in paths}


@contextlib.contextmanager
def _forgetting(prefix: str):
    """After the block, modules of this prefix are no longer imported; what else was imported meanwhile stays."""
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(prefix)]:
            del sys.modules[name]


@contextlib.contextmanager
def torch_build(table: list[Mutant], number: int):
    """Within the block, the torch backend is its test build with this switch on (0: none)."""
    from ...backends import torch_

    path = pathlib.Path(torch_.__file__)
    module = types.ModuleType(f"{torch_.__name__}test_build_{number}")
    module.__package__, module.__file__, module.MUTANT = torch_.__package__, torch_.__file__, number
    with _forgetting(module.__name__):
        sys.modules[module.__name__] = module  # where dataclasses look their names up
        exec(compile(sources_with_switches([path], table)[path.name], path.name, "exec"), module.__dict__)
        built, backend = module.TorchBackend(), registry.load("torch")
        with mock.patch.multiple(backend, forward=built.forward, backward=built.backward):
            yield


@contextlib.contextmanager
def triton_build(table: list[Mutant], number: int):
    """Within the block, the Triton backend launches kernels of a test build with this switch on (0: none)."""
    from ...backends import triton_
    from ...triton_kernels import step

    kernels = {"forward": "forward_kernel", "backward_queries": "backward_queries_kernel", "backward_keys": "backward_keys_kernel"}
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's source from its file
        package = pathlib.Path(folder) / f"triton_kernels_test_build_{number}"
        package.mkdir()
        paths = sorted(pathlib.Path(step.__file__).parent.glob("*.py"))
        for name, text in sources_with_switches(paths, table).items():
            text = f"{text}\n\nMUTANT = tl.constexpr({number})\n" if "MUTANT" in text else text
            (package / name).write_text(text, encoding="utf-8")
        with mock.patch.object(sys, "path", [folder, *sys.path]), _forgetting(package.name):
            built = {kernel: getattr(importlib.import_module(f"{package.name}.{name}"), kernel) for name, kernel in kernels.items()}
            with mock.patch.multiple(triton_, **built):
                yield


BUILDS = {"torch": torch_build, "triton": triton_build}


AS_SHIPPED = Mutant("as shipped", "a control: nothing is wrong")
SWITCHED_OFF = Mutant("switched off", "a control: the test build with all switches off")
CONTROLS = (AS_SHIPPED, SWITCHED_OFF)


@contextlib.contextmanager
def planted(backend, mutant: Mutant, switched: list[Mutant]):
    """Within the block, the registered backend is this mutant; switched: its table of switches, in which they are numbered."""
    with contextlib.ExitStack() as stack:
        if mutant.switches or mutant is SWITCHED_OFF:
            number = 1 + switched.index(mutant) if mutant.switches else 0
            stack.enter_context(BUILDS[backend.name](switched, number))
        for direction, wrapper in mutant.wrappers.items():
            right = getattr(backend, direction)
            stack.enter_context(mock.patch.object(backend, direction, functools.partial(wrapper, right)))
        yield
