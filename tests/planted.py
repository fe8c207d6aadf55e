"""Planted faults for the tuner's tests: a backend, torch's with configs that say what goes wrong; damaged files."""

import dataclasses
import os
import signal
import time

import torch

from sbkernels.backends.torch_ import TorchBackend, TorchConfig

FAULTS = {
    "illegal access": "crashed", "endless loop": "hung", "out of memory": "out of memory", "not compiled": "not compiled",
    "raises": "crashed",
    "wrong tail": "wrong", "stale": "wrong", "nan": "wrong", "writes beyond": "wrong", "wrong gradient": "wrong",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planted:
    """fault: one of FAULTS or none; number tells configs apart; delay: milliseconds that a call sleeps."""

    fault: str = "none"
    number: int = 0
    delay: float = 0.0


def damaged(whole: bytes, number: int, generator) -> bytearray:
    """A file's bytes cut short somewhere or, for even numbers, with a flipped bit."""
    content = bytearray(whole)
    if number % 2:
        return content[: generator.randrange(len(content))]
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return content


class PlantedBackend(TorchBackend):
    name = "planted"
    config_types = {"forward": Planted, "backward": Planted}
    compiles = True
    space = ()  # what a test wants tried
    _kept = {}

    def default_config(self, problem):
        return Planted()

    def config_space(self, problem):
        return list(type(self).space)

    def illegal(self, problem, config):
        return None

    def compile(self, problem, config):
        if config.fault == "not compiled":
            raise RuntimeError("planted: does not compile")

    def forward(self, call, config):
        if config.fault == "illegal access":
            os.kill(os.getpid(), signal.SIGSEGV)
        while config.fault == "endless loop":
            time.sleep(0.01)
        if config.fault == "out of memory":
            raise torch.OutOfMemoryError("planted: out of memory")
        if config.fault == "raises":
            raise RuntimeError("planted: an error")
        time.sleep(config.delay / 1e3)
        out, remainder, saved = super().forward(call, TorchConfig(64, 64, 2))
        if config.fault == "wrong tail" and call.problem.queries % 64:
            out[..., -1, :] *= 1.01
        if config.fault == "nan":
            out[0, 0, -1, 0] = float("nan")
        if config.fault == "writes beyond":
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1.0)
        if config.fault == "stale":
            out, remainder = self._kept.setdefault((call.q.shape, config.number), (out.clone(), remainder.clone()))
        return out, remainder, saved

    def backward(self, call, config, remainder, saved, dout, dremainder):
        gradients = super().backward(call, TorchConfig(64, 64, 2), remainder, saved, dout, dremainder)
        if config.fault == "wrong gradient":
            gradients[1][:, :, 0] = 0
        return gradients

    def sources(self):
        return [__file__]
