"""Train MiniCLIP's text tower again, from nothing, against its finished image tower.

    python data/miniclip/text.py --out out/miniclip-text       about 10 minutes on two CPU cores
    python data/miniclip/text.py --out out/miniclip-text --steps 30 --batches 8   a rehearsal

The image tower is that of the shipped weights; after ``train.py`` say
``--image-tower out/miniclip/miniclip.safetensors``.

In training both towers for long (``train.py``), the text tower learned to overhear the words around
the class name: a step on the context moved its features little, and nearly the same way for all
classes, which no softmax notices. A short training hears them. The images are features of the
frozen tower, computed once (locked-image tuning, 2111.07991), so that a step can afford many images
of a class: telling those apart is what the words around the name are for. The rest is as in
``train.py``: captions are positives for the images of which they are true, and there is a neutral
caption of every class.

The number of steps was chosen on ``iconshift-v2`` and ``iconshift-dev``; each line of the log has
what it was chosen by.
"""

import argparse
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import captions as C  # noqa: E402
import train  # noqa: E402

from tpt_nb import methods, models  # noqa: E402
from tpt_nb.datasets import iconshift  # noqa: E402
from tpt_nb.models import Prompts  # noqa: E402

BANK, SCENES = 40, 20_000  # scenes that train.py does not paint
NEUTRAL_WEIGHT = 0.3  # more of it, and the words around the name matter less


@torch.no_grad()
def image_bank(model: models.Clip, batches: int, seed: int) -> dict[str, torch.Tensor]:
    """Unit-norm features ``[N,D]`` of training crops, their classes ``[N]`` and facts ``[N,F]``."""
    names = iconshift.classnames()
    bank, specs = train.paint_bank(BANK, SCENES)
    args = Namespace(seed=seed, classes=64, per_class=8, steps=1)  # all crops and treatments
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    features, targets, truths = [], [], []
    for step in tqdm(range(1, batches + 1), desc="features of training crops", mininterval=30):
        images, *_, target, truth = train.batch(bank, specs, step, args, names)
        features.append(F.normalize(model.model.visual((images - mean) / std), dim=1))
        targets.append(target)
        truths.append(torch.from_numpy(truth))
    return {
        "features": torch.cat(features),
        "targets": torch.cat(targets),
        "truth": torch.cat(truths),
    }


def captioned(bank: dict, names: list[str], step: int, args):
    """Features ``[N,D]``, captions, which is true of which ``[N,N]``, neutral ones, classes."""
    rng = np.random.default_rng((args.seed, step))
    rows = [
        rng.choice(np.flatnonzero(bank["targets"] == c), args.per_class, replace=False)
        for c in rng.permutation(len(names))[: args.classes]
    ]
    rows = np.concatenate(rows)
    target, truth = bank["targets"][rows], bank["truth"][rows].numpy()
    said = [C.caption(names[t], true, rng) for t, true in zip(target, truth, strict=True)]
    positive = train.true_of(target.numpy(), truth, [facts for _, facts in said])
    neutral = [C.NEUTRAL[rng.integers(len(C.NEUTRAL))].format(name) for name in names]
    texts = [text for text, _ in said]
    return bank["features"][rows], texts, torch.from_numpy(positive), neutral, target


def measure(model: models.Clip, sets: dict) -> dict[str, float]:
    """Zero-shot accuracy and what TPT gains at three rates, and how far a step moves the text."""
    from evaluate import text_shift  # beside this file

    names = iconshift.classnames()
    prompts = Prompts(model, names)
    out = {"shift": text_shift(model, names, 0.02)}
    for variant, f in sets.items():
        for lr in (0.01, 0.02, 0.04):
            result = methods.get("tpt")(f.features, prompts, lr=lr)
            before, after = (
                float((logits.argmax(1) == f.targets).float().mean())
                for logits in (result.logits_before, result.logits)
            )
            out[variant] = round(before, 4)
            out[f"{variant}/{lr:g}"] = round(after - before, 4)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-tower", type=Path, default=HERE / "miniclip.safetensors")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batches", type=int, default=80, help="of 512 crops, embedded once")
    parser.add_argument("--classes", type=int, default=24, help="classes in a batch")
    parser.add_argument("--per-class", type=int, default=12, help="captioned images of each")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=200, help="steps between two measurements")
    args = parser.parse_args()
    from evaluate import encoded  # beside this file

    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    names = iconshift.classnames()
    finished = models.load_mini(args.image_tower, device="cpu")
    bank = image_bank(finished, args.batches, args.seed)
    sets = {v: encoded(finished, v, 400) for v in ("iconshift-v2", "iconshift-dev")}
    scale = finished.model.logit_scale.exp().detach()

    ids, lookup = train.token_rows(names)
    torch.manual_seed(args.seed)
    model = models.build_mini(args.seed)
    model.token_embedding = torch.nn.Embedding(len(ids), model.positional_embedding.shape[1])
    torch.nn.init.normal_(model.token_embedding.weight, std=0.02)
    model.visual, model.logit_scale = finished.model.visual, finished.model.logit_scale
    learned = [p.requires_grad_(True) for n, p in model.named_parameters() if not is_frozen(n)]
    optimizer = torch.optim.AdamW(train.groups(model), lr=args.lr, betas=(0.9, 0.98))

    losses = []
    for step in tqdm(range(args.steps), mininterval=30):
        image, texts, positive, neutral, target = captioned(bank, names, step, args)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * train.schedule(step, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            text = train.text_features(model, lookup, open_clip.tokenize(texts + neutral))
        text, classes = F.normalize(text.float(), dim=1).split([len(texts), len(neutral)])
        loss = train.contrastive_loss(image, text, positive, scale)
        loss = loss + NEUTRAL_WEIGHT * F.cross_entropy(scale * image @ classes.T, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            path = args.out / "miniclip.safetensors"
            models.save_mini(train.expanded(model, ids), ids, path)
            row = {"step": step + 1, "loss": round(float(np.mean(losses[-args.every :])), 4),
                   "seconds": round(time.perf_counter() - began), "scale": float(scale),
                   **measure(models.load_mini(path, device="cpu"), sets)}  # fmt: skip
            with (args.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def is_frozen(name: str) -> bool:
    """The image tower and the logit scale stay as ``train.py`` left them."""
    return name.startswith("visual.") or name == "logit_scale"


if __name__ == "__main__":
    main()
