"""Adversarial filter of iconshift-a: keep the candidates that a reference classifier gets wrong.

    python data/iconshift/filter.py            train the reference, write filter-a.json (minutes)
    python data/iconshift/filter.py --check    the same, compare with what is shipped

As for ImageNet-A (Hendrycks et al., 1907.07174), the judge is not a model under test: a small
plain convolutional classifier (no CLIP, no text, another architecture) trained with cross-entropy
on source scenes. Of the candidates that it gets wrong, the first ten of every class stay.
Floating point differs between machines, so a rerun may flip a few borderline candidates;
``--check`` reports the overlap.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tpt_nb.datasets import iconshift  # noqa: E402

CANDIDATES = 6000
PER_CLASS = 10
STEPS = 1500
BATCH = 128
FIRST_TRAIN = 10_000_000  # training indices far from those that MiniCLIP saw
SCENES = 12_000


def reference(classes: int) -> nn.Module:
    """A plain convolutional classifier of 64 px images."""

    def block(i: int, o: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    widths = (32, 64, 128, 256)
    layers = block(3, widths[0], 2)
    for i, o in zip(widths, (*widths[1:], 256), strict=True):
        layers += block(i, o, 2 if o < 256 or i < 256 else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes))


def as_tensor(image, side: int) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((side, side), 3))).permute(2, 0, 1)


def train(seed: int = 0) -> nn.Module:
    """The reference classifier, trained on random crops of source scenes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    specs = [iconshift.spec("iconshift-train", FIRST_TRAIN + i) for i in range(SCENES)]
    bank = torch.stack([as_tensor(iconshift.compose(s, 80), 80) for s in specs])
    targets = torch.tensor([s["target"] for s in specs])
    model = reference(len(iconshift.classnames())).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for step in range(STEPS):
        rows = torch.from_numpy(rng.integers(0, SCENES, BATCH))
        x, y = rng.integers(0, 17, 2)
        images = bank[rows][:, :, y : y + 64, x : x + 64].float() / 127.5 - 1
        images = images.flip(-1) if rng.random() < 0.5 else images
        images = images.to(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(model(images), targets[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def hits(model: nn.Module, variant: str, n: int) -> list[bool]:
    """Whether the classifier is right on each of the first ``n`` candidates of a variant."""
    right = []
    for start in range(0, n, 200):
        specs = [iconshift.spec(variant, i) for i in range(start, min(n, start + 200))]
        images = torch.stack([as_tensor(iconshift.compose(s), 64) for s in specs])
        predicted = model(images.float() / 127.5 - 1).argmax(1)
        right += [int(p) == s["target"] for p, s in zip(predicted, specs, strict=True)]
    return right


def build() -> dict:
    model = train()
    source = np.mean(hits(model, "iconshift-v2", 1000))
    right = hits(model, "iconshift-a", CANDIDATES)
    wrong = [i for i, hit in enumerate(right) if not hit]
    classes = len(iconshift.classnames())
    kept = [[i for i in wrong if i % classes == c][:PER_CLASS] for c in range(classes)]
    return {
        "reference_accuracy_iconshift_v2": round(float(source), 4),
        "reference_accuracy_candidates": round(float(np.mean(right)), 4),
        "candidates": CANDIDATES,
        "kept": sorted(i for group in kept for i in group),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    result, path = build(), HERE / "filter-a.json"
    print({**result, "kept": len(result["kept"])})
    if not check:
        path.write_text(json.dumps(result) + "\n")
        return 0
    old, new = set(json.loads(path.read_text())["kept"]), set(result["kept"])
    print(f"{len(old & new)} of {len(old)} shipped candidates kept again")
    return 0 if len(old & new) >= 0.9 * len(old) else 1


if __name__ == "__main__":
    sys.exit(main())
