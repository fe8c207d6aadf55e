"""NVTX ranges around a backend's forward and backward, for timelines of Nsight Systems: with SBKERNELS_NVTX=1 only."""

from __future__ import annotations

import dataclasses

import torch

from . import env


def annotated(choice, problem):
    """The choice, with SBKERNELS_NVTX=1 on a GPU one whose passes are ranges; the variable is read once a kind of call.

    Without it the choice is the one that came, so that calls pay nothing.
    """
    if not env.nvtx() or problem.device_type != "cuda":
        return choice
    return dataclasses.replace(choice, backend=Annotated(choice.backend, f"sbkernels {choice.backend.name} {problem}"))


class Annotated:
    """A backend whose forward and backward are in a range of this name; all else is the backend's."""

    def __init__(self, backend, name: str):
        self._backend, self._name = backend, name

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def forward(self, *arguments):
        """The backend's, in the range."""
        with torch.cuda.nvtx.range(self._name):
            return self._backend.forward(*arguments)

    def backward(self, *arguments):
        """The backend's, in the range."""
        with torch.cuda.nvtx.range(self._name):
            return self._backend.backward(*arguments)
