"""Captures queries, keys and values of a trained stick-breaking transformer, as test data with realistic logits.

    python tests/data/capture.py                # about ten minutes on one core; --help lists the options

Trains a small byte-level decoder (Tan et al. 2024, arXiv 2410.17980: stick-breaking attention, no position embeddings, the
rest of the stick stays on the token's own value) on the Python standard library's sources and stores what each layer hands to
attention on a window of held-out text: "layers.{i}.q", ".k" and ".v", float16 [1, HEADS, LENGTH, HEAD_DIM] (layout "bhnd").
Ctrl-C ends the training early and captures from what was trained so far. Last, it prints how far the stick reaches per layer.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn

from sbkernels import stickbreaking_attention

LAYERS, HEADS, HEAD_DIM = 4, 4, 32
WIDTH = HEADS * HEAD_DIM
MLP_FACTOR = 4
VOCABULARY = 256  # bytes
LENGTH = 512  # tokens of a window

BATCH = 4
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0

HELD_OUT = 0.05  # the last part of the text
EVALUATION_WINDOWS = 64
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
NEGLIGIBLE = 2.0**-24  # share of a stick

MODEL = (
    f"pre-norm byte decoder, {LAYERS} layers, width {WIDTH}, {HEADS} heads of {HEAD_DIM}, GELU MLP x{MLP_FACTOR}, "
    "no position embeddings, stick-breaking attention + remainder * v"
)
TEXT = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"


class Block(nn.Module):
    """One pre-norm layer: attention, then MLP, each added to its input."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, MLP_FACTOR * WIDTH), nn.GELU(), nn.Linear(MLP_FACTOR * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor):
        """x [B, N, WIDTH] to the same shape, and (q, k, v), each [B, N, HEADS, HEAD_DIM]."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        out, remainder = stickbreaking_attention(q, k, v, layout="bnhd")
        x = x + self.project((out + remainder[..., None] * v).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), (q, k, v)


class Decoder(nn.Module):
    """Byte embeddings, LAYERS blocks and a head that scores the next byte."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False))

    def forward(self, tokens: torch.Tensor):
        """tokens [B, N] to scores of the next byte [B, N, VOCABULARY], and each layer's (q, k, v)."""
        x, captured = self.embed(tokens), []
        for block in self.blocks:
            x, qkv = block(x)
            captured.append(qkv)
        return self.head(x), captured

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean nats per byte of windows [B, LENGTH + 1], each byte but the first predicted from those before it."""
        scores, _ = self(windows[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())


def read_text() -> tuple[torch.Tensor, torch.Tensor]:
    """The standard library's sources in path order, as uint8 [bytes]: the part to train on and the part held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    sources = [(root / path).read_bytes() for path in paths if SKIPPED_FOLDERS.isdisjoint(path.parts)]
    text = torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8)
    split = int(len(text) * (1 - HELD_OUT))
    return text[:split], text[split:]


def windows_at(text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Windows [len(starts), LENGTH + 1] of the text, int64."""
    return text[starts[:, None] + torch.arange(LENGTH + 1)].long()


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warmup, then a half cosine down to zero."""
    return min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(model: Decoder, text: torch.Tensor, steps: int, console: Console) -> int:
    """Trains on random windows until `steps` or Ctrl-C; returns the steps done."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    done = 0
    try:
        with Progress("training", *columns, console=console) as progress:
            task = progress.add_task("training", total=steps, loss=math.nan)
            while done < steps:
                loss = model.loss(windows_at(text, torch.randint(len(text) - LENGTH, (BATCH,))))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()
                schedule.step()
                done += 1
                progress.update(task, completed=done, loss=loss.item())
    except KeyboardInterrupt:
        console.print(f"stopped after {done} of {steps} steps")
    return done


@torch.no_grad()
def held_out_loss(model: Decoder, text: torch.Tensor) -> float:
    """Mean nats per byte over windows spread evenly over the held-out text."""
    starts = torch.linspace(0, len(text) - LENGTH - 1, EVALUATION_WINDOWS).long()
    return torch.stack([model.loss(windows_at(text, some)) for some in starts.split(BATCH)]).mean().item()


@torch.no_grad()
def capture(model: Decoder, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every layer hands to attention for tokens [1, N]: name to float16 [1, HEADS, N, HEAD_DIM]."""
    _, captured = model(tokens)
    return {
        f"layers.{layer}.{name}": x.transpose(1, 2).contiguous().half()
        for layer, qkv in enumerate(captured)
        for name, x in zip("qkv", qkv, strict=True)
    }


def stick_reach(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From q and k [1, HEADS, N, HEAD_DIM]: the visible keys' logits, flat, and how many keys each stick lasts [HEADS, N].

    A stick lasts for the newest keys up to the one that leaves less than NEGLIGIBLE of it, or for all the query sees.
    """
    z = (q[0].double() @ k[0].double().mT) * HEAD_DIM**-0.5
    visible = torch.ones(z.shape[1:], dtype=torch.bool).tril(-1)
    left = torch.sigmoid(-z).masked_fill(~visible, 1.0).flip(-1).cumprod(-1).flip(-1)  # after each key, newest to oldest
    lasts = (visible & (left >= NEGLIGIBLE)).sum(-1) + 1
    return z[:, visible].flatten(), lasts.minimum(visible.sum(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1900, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    default_out = Path(__file__).with_name("captured_qkv.safetensors")
    parser.add_argument(
        "--out", type=Path, default=default_out, metavar="FILE", help=f"default: {default_out.name} beside this script"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args()

    console = Console(soft_wrap=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = Decoder()
    training, held_out = read_text()
    steps = train(model, training, options.steps, console)
    loss = held_out_loss(model, held_out)
    tensors = capture(model, held_out[None, :LENGTH].long())
    metadata = {
        "model": MODEL,
        "text": TEXT,
        "steps": str(steps),
        "seed": str(options.seed),
        "held_out_loss": f"{loss:.4f}",
        "torch": torch.__version__,
    }
    save_file(tensors, options.out, metadata)

    console.print(f"{options.out}: {options.out.stat().st_size:,} bytes, {steps} steps, held-out loss {loss:.4f} nats/byte")
    for layer in range(LAYERS):
        z, lasts = stick_reach(tensors[f"layers.{layer}.q"], tensors[f"layers.{layer}.k"])
        median, most = lasts.double().quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        console.print(
            f"layer {layer}: logits {z.mean():.2f} ± {z.std():.2f}; the stick lasts {median:.0f} keys (median), "
            f"{most:.0f} (95th percentile) of up to {LENGTH - 1}"
        )


if __name__ == "__main__":
    main()
