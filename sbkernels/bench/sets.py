"""Sets of problems by name. In all of them the stick stays alive over all keys and early stop is off, so that every key counts."""

from __future__ import annotations

import dataclasses
import random

from ..verify import inputs
from . import step

BOTH = ("forward", "backward")
WIDTH = 2048  # of all heads together
TRAINING_TOKENS, PACKED_TOKENS, DECODED_KEYS = 2**16, 2**15, 2**20
MOST_DECODED = 16  # sequences
# Tokens of a document: log-normal with the mean and the standard deviation of log(characters / 4) over the 736 texts
# peps/pep-*.rst of github.com/python/peps at commit ba4deeb79 (median 3,549 tokens, mean 4,857, longest 30,363).
DOCUMENTS_MEAN, DOCUMENTS_STD, DOCUMENTS_SEED = 8.137, 0.877, 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem of a set. case: its attention. step: the decoder whose training step is timed; None for attention alone."""

    name: str
    case: inputs.Case
    dtype: str
    directions: tuple[str, ...] = BOTH
    step: step.Shape | None = None

    @property
    def inputs(self) -> str:
        """What is drawn, in words, for a record."""
        drawn = f"logits of mean {inputs.alive_logit(self.case.N):.3g} and standard deviation 1, values N(0, 1), early stop off"
        if self.case.lengths:
            drawn += f"; lengths log-normal({DOCUMENTS_MEAN}, {DOCUMENTS_STD}), seed {DOCUMENTS_SEED}"
        return f"{drawn}; {self.step}" if self.step else drawn


def attention(B: int, H: int, Hk: int, M: int, N: int, D: int, **more) -> inputs.Case:
    """A case whose logits leave the stick alive."""
    return inputs.Case("alive", B, H, Hk, M, N, D, D, **more)


def document_lengths(tokens: int) -> tuple[int, ...]:
    """Lengths of documents one after the other, the last one cut off where the tokens are used up."""
    draw, found = random.Random(DOCUMENTS_SEED), []
    while (left := tokens - sum(found)) > 0:
        found.append(min(left, max(1, round(draw.lognormvariate(DOCUMENTS_MEAN, DOCUMENTS_STD)))))
    return tuple(found)


def training() -> list[Case]:
    """D of 64 and 128, N from 1k to 64k, as many tokens each."""
    shapes = [(TRAINING_TOKENS // N, WIDTH // D, N, D) for D in (64, 128) for N in (2**n for n in range(10, 17))]
    return [Case(f"{B}x{H} heads, {N // 1024}k D={D}", attention(B, H, H, N, N, D), "bfloat16") for B, H, N, D in shapes]


def varlen() -> list[Case]:
    """Packed documents."""
    lengths, found = document_lengths(PACKED_TOKENS), []
    for D, Hk in ((64, WIDTH // 64), (128, WIDTH // 128), (128, WIDTH // 128 // 4)):
        H = WIDTH // D
        case = attention(1, H, Hk, PACKED_TOKENS, PACKED_TOKENS, D, lengths=lengths)
        found.append(Case(f"{len(lengths)} documents, {H}/{Hk} heads D={D}", case, "bfloat16"))
    return found


def gqa() -> list[Case]:
    """Several query heads on a key head."""
    shapes = ((2, 32, 8, 4096), (2, 32, 4, 4096), (2, 32, 1, 4096), (1, 32, 8, 16384))
    return [Case(f"{H}/{Hk} heads, {N // 1024}k D=128", attention(B, H, Hk, N, N, 128), "bfloat16") for B, H, Hk, N in shapes]


def wide() -> list[Case]:
    """Head dims beyond 128."""
    shapes = ((4, 4096, 192), (4, 4096, 256), (1, 16384, 256))
    return [Case(f"{B}x8 heads, {N // 1024}k D={D}", attention(B, 8, 8, N, N, D), "bfloat16") for B, N, D in shapes]


def decode() -> list[Case]:
    """One query a sequence; N from 1k to 1M, and as many sequences as a million keys allow."""
    found = []
    for N in (2**n for n in range(10, 21, 2)):
        B = min(MOST_DECODED, DECODED_KEYS // N)
        found.append(Case(f"{B}x32/8 heads, {N // 1024}k D=128", attention(B, 32, 8, 1, N, 128), "bfloat16", ("decode",)))
    return found


def overhead() -> list[Case]:
    """So little work that launching it is what counts."""
    return [Case("1 head, 64 D=64", attention(1, 1, 1, 64, 64, 64), "bfloat16")]


def steps() -> list[Case]:
    """A training step of a decoder, as in the paper."""
    return [step_case(step.PAPER, "bfloat16")]


def cpu() -> list[Case]:
    """What a CPU does in a minute, in float32: attention, decoding, and a step of a tiny decoder."""
    return [
        Case("4 heads, 512 D=64", attention(1, 4, 4, 512, 512, 64), "float32"),
        Case("8/2 heads, 1k D=64", attention(1, 8, 2, 1024, 1024, 64), "float32"),
        Case("2x8/2 heads, 4k D=64", attention(2, 8, 2, 1, 4096, 64), "float32", ("decode",)),
        step_case(step.TINY, "float32"),
    ]


def step_case(shape: step.Shape, dtype: str) -> Case:
    """The training step of a decoder."""
    case = attention(shape.batch, shape.heads, shape.heads, shape.tokens, shape.tokens, shape.head_dim)
    return Case(f"decoder of {shape.depth}, {shape.tokens} tokens", case, dtype, ("step",), shape)


SETS = {
    "training": training, "varlen": varlen, "gqa": gqa, "wide": wide, "decode": decode, "overhead": overhead, "step": steps,
    "cpu": cpu,
}  # fmt: skip


def default(device: str) -> str:
    """The set of a machine on which none is asked for."""
    return "training" if device.startswith("cuda") else "cpu"


def of(name: str, device: str) -> list[Case]:
    """The cases of a set. ValueError if there is none of this name, or a CPU would take hours for it."""
    if name not in SETS:
        raise ValueError(f"--set {name!r}: expected one of {', '.join(SETS)}")
    if device == "cpu" and name not in ("cpu", "overhead"):
        raise ValueError(f"--set {name} is for a GPU and the device is {device}: expected cpu or overhead")
    return SETS[name]()
