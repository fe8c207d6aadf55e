"""Where there is no GPU, Triton's kernels run through its interpreter; that has to be said before triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
