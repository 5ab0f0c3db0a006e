"""Train the embedded image-variation generator on IconShift's source scenes, from nothing.

    python data/diffusion/train.py --out out/diffusion              about an hour on one CPU core
    python data/diffusion/train.py --out out/diffusion --steps 100  a rehearsal

A diffusion model of 32 px images, conditioned on MiniCLIP's embedding of an image: diffusers' own
UNet and noise schedule. A training pair is two views of one scene: what the embedding is of (the
whole scene, or a crop of it), and what is to be made (a crop in which the object fills most of the
frame). So it learns to make *other views of what the embedding says*, as views of test-time
augmentation are, and an object that is small in its scene comes out at a size that 32 px can show.
One time in ten the embedding is left out, for classifier-free guidance.

The network's map of places (`difftpt.Network`) takes part from step 3000 on. It was added during
the only run, when the samples had the colours and not the shapes of what they should show;
whoever starts anew may well let it take part at once (`--map-from 0`).

Scenes come from the training stream (`iconshift-train`), from indices that MiniCLIP did not see.
The batch of a step depends on (seed, step) only: a killed run goes on from its last checkpoint.

What ships is `generator.safetensors` of the output folder and its `log.jsonl`, as `training.jsonl`;
evaluate.py then writes the card, and pictures that were made before have to be made again.

With more: `--scenes 200000 --batch 256 --steps 100000` on a GPU (bfloat16 there too) is what a run
of some hours would be; the network (network.json) could then be wider, and 64 px large.
"""

import argparse
import io
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from safetensors.torch import load_file, save
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tpt_nb import models  # noqa: E402
from tpt_nb.core.files import write_whole  # noqa: E402
from tpt_nb.core.machine import has_gpu  # noqa: E402
from tpt_nb.datasets import iconshift  # noqa: E402
from tpt_nb.methods import difftpt  # noqa: E402

PAINT = 128  # scenes are painted at this size
FIRST = 1_000_000  # of the stream; MiniCLIP was trained on the first 150,000
HELD_OUT = 9_000_000  # scenes that measure the loss
DROP = 0.1  # share of pairs without an embedding
DECAY = 0.999  # of the moving average of the weights


# --- pairs ---------------------------------------------------------------------------------------


def crop_of(s: dict, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A square crop (left, top, right, bottom, as shares) in which the object is large.

    Its side is 1 to 1.5 times the object's frame, 90 % of which it shows at least.
    """
    side = min(1.0, s["side"] * rng.uniform(1.0, 1.5))
    place = []
    for a in (s["left"], s["top"]):
        slack = 0.05 * s["side"]
        low = max(0.0, min(1 - side, a + s["side"] - side - slack))
        high = max(low, min(1 - side, a + slack))
        place.append(rng.uniform(low, high))
    return place[0], place[1], place[0] + side, place[1] + side


def views_of(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scene ``index``: uint8 ``[3,3,64,64]`` (whole, two crops) and ``[2,3,32,32]`` (the crops)."""
    s = iconshift.spec("iconshift-train", index)
    image = iconshift.compose(s, PAINT)
    rng = np.random.default_rng([7, index])
    seen = [image.resize((64, 64), Image.Resampling.BICUBIC)]
    made = []
    for _ in range(2):
        box = tuple(PAINT * x for x in crop_of(s, rng))
        seen.append(image.resize((64, 64), Image.Resampling.BICUBIC, box))
        made.append(image.resize((difftpt.SIDE,) * 2, Image.Resampling.BICUBIC, box))
    return torch.stack([TF.pil_to_tensor(i) for i in seen]), torch.stack(
        [TF.pil_to_tensor(i) for i in made]
    )


def make_bank(path: Path, first: int, scenes: int) -> dict[str, torch.Tensor]:
    """Of N scenes: ``made`` uint8 ``[N,2,3,32,32]``, crops; ``seen`` ``[N,3,256]``, embeddings."""
    if path.exists():
        return load_file(path)
    mini = models.load("mini", device="cpu")
    made, seen = [], []
    for start in tqdm(range(first, first + scenes, 100), desc="scenes", mininterval=10):
        parts = [views_of(i) for i in range(start, start + 100)]
        views = torch.cat([p[0] for p in parts])
        seen.append(mini.encode_views(views).unflatten(0, (-1, 3)))
        made.append(torch.stack([p[1] for p in parts]))
    bank = {"made": torch.cat(made), "seen": torch.cat(seen)}
    write_whole(path, save(bank))
    return bank


def pairs(bank: dict, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[B,3,32,32]`` in [-1,1] and embeddings ``[B,256]`` of views of the same scenes."""
    rows = torch.from_numpy(rng.integers(len(bank["made"]), size=size))
    images = bank["made"][rows, torch.from_numpy(rng.integers(2, size=size))]
    return images.float() / 127.5 - 1, bank["seen"][
        rows, torch.from_numpy(rng.integers(3, size=size))
    ]


# --- loss ----------------------------------------------------------------------------------------


def loss_of(network, alphas, images, condition, t, noise):
    """Squared error of the velocity, with less weight where there is hardly any noise.

    That is min-SNR (Hang et al. 2023) with gamma 5, but 1 where there is hardly any signal: it is
    there that few-step sampling begins.
    """
    a = alphas[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * images + (1 - a).sqrt() * noise
    velocity = a.sqrt() * noise - (1 - a).sqrt() * images
    error = (network(noisy, t, condition) - velocity).square().mean((1, 2, 3))
    return (error * (5 * (1 - alphas[t])).clamp(max=1)).mean()


def schedule_of(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def held_out_loss(network, alphas, bank, center, spread) -> float:
    """On 256 held-out pairs, the same noise every time."""
    rng, draw = np.random.default_rng(0), torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(4):
        images, seen = pairs(bank, 64, rng)
        t = torch.randint(0, 1000, (64,), generator=draw)
        noise = torch.randn(images.shape, generator=draw)
        total += float(loss_of(network, alphas, images, (seen - center) / spread, t, noise)) / 4
    return total


def sheet(network, bank, center, spread, path: Path, rows: int = 8) -> None:
    """A PNG: a crop of a held-out scene, then seven variations from the whole scene's embedding."""
    picks = torch.arange(rows) * 7
    condition = ((bank["seen"][picks, 0] - center) / spread).repeat_interleave(7, 0)
    noise = torch.randn(len(condition), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    made = difftpt.denoise(network, difftpt.build_schedule(), noise, condition)
    made = difftpt.as_bytes(made).unflatten(0, (rows, 7))
    grid = torch.cat([bank["made"][picks, :1], made], 1)  # [rows,8,3,32,32]
    pixels = grid.permute(0, 3, 1, 4, 2).reshape(rows * 32, 8 * 32, 3).numpy()
    Image.fromarray(pixels).resize((8 * 64, rows * 64), Image.Resampling.NEAREST).save(path)


# --- the run -------------------------------------------------------------------------------------


class Training:
    """Network, moving average and optimiser: one step, and what is written of them."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args, self.device = args, device
        bank = make_bank(args.out / f"bank-{args.scenes}.safetensors", FIRST, args.scenes)
        self.bank = bank
        self.test = make_bank(args.out / "bank-held-out.safetensors", HELD_OUT, 1000)
        moments = (f(bank["seen"], (0, 1)).half().float() for f in (torch.mean, torch.std))
        self.center, self.spread = moments
        self.alphas = difftpt.build_schedule().alphas_cumprod
        torch.manual_seed(args.seed)
        network = difftpt.Network()
        with torch.no_grad():  # what has not taken part yet is not heard
            network.unet.conv_in.weight[:, 12:] = 0
        self.average = difftpt.Network().eval().requires_grad_(False)
        self.average.load_state_dict(network.state_dict())
        self.network = network.to(device).train()
        decay = [p for p in network.parameters() if p.ndim > 1]
        rest = [p for p in network.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99))
        self.parts = {"network": network, "average": self.average, "optimizer": self.optimizer}

    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
        """Images, conditions, timesteps and noise of a step; they depend on (seed, step) only."""
        size = self.args.batch
        rng = np.random.default_rng([self.args.seed, step])
        draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images, seen = pairs(self.bank, size, rng)
        condition = (seen - self.center) / self.spread
        condition[torch.from_numpy(rng.random(size) < DROP)] = 0
        # one timestep in each of B equal parts of the schedule: less noise in the loss
        t = torch.arange(size) + torch.rand(size, generator=draw)
        noise = torch.randn(images.shape, generator=draw)
        return images, condition, (t / size * 1000).long(), noise

    def step(self, step: int) -> float:
        """One step of the optimiser and of the average; returns the loss."""
        images, condition, t, noise = (x.to(self.device) for x in self.batch(step))
        self.network.share = self.average.share = float(step >= self.args.map_from)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * schedule_of(step, self.args.steps)
        with torch.autocast(self.device, torch.bfloat16):
            alphas = self.alphas.to(self.device)
            loss = loss_of(self.network, alphas, images, condition, t, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        keep = min(DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            both = zip(self.average.parameters(), self.network.parameters(), strict=True)
            for mean, now in both:
                mean.lerp_(now.to(mean.device), 1 - keep)
        return loss.item()

    def resume(self, path: Path) -> tuple[int, float]:
        """(steps, seconds) of a checkpoint, which is loaded; (0, 0) if there is none."""
        if not path.exists():
            return 0, 0.0
        saved = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        print(f"resumed at step {saved['step']} of {self.args.steps}", flush=True)
        return saved["step"], saved["seconds"]

    def save(self, path: Path, done: int, seconds: float, loss: float) -> None:
        """A line of the log, the checkpoint, the weights that ship, and a sheet of samples."""
        known = self.test, self.center, self.spread
        held_out = held_out_loss(self.average, self.alphas, *known)
        row = {"step": done, "loss": round(loss, 4), "held_out": round(held_out, 4)}
        row |= {"seconds": round(seconds)}
        with (path.parent / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        written = io.BytesIO()
        torch.save(state | {"step": done, "seconds": seconds}, written)
        write_whole(path, written.getvalue())
        half = {k: v.half().contiguous() for k, v in self.average.state_dict().items()}
        half |= {"condition.mean": self.center.half(), "condition.std": self.spread.half()}
        write_whole(path.parent / "generator.safetensors", save(half))
        sheet(self.average, *known, path.parent / f"sheet-{done:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--map-from", type=int, default=3000, metavar="STEP")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args, "cuda" if has_gpu() else "cpu")
    checkpoint = args.out / "checkpoint.pt"
    start, seconds = training.resume(checkpoint)
    losses, began = [], time.perf_counter() - seconds
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=60):
        losses.append(training.step(step))
        done = step + 1
        if done % 50 == 0:
            print(f"step {done}: loss {np.mean(losses[-50:]):.4f}", flush=True)
        if done % 500 == 0 or done == args.steps:
            training.save(checkpoint, done, time.perf_counter() - began, float(np.mean(losses)))
            losses = []


if __name__ == "__main__":
    main()
