"""Train MiniCLIP on IconShift's source styles, from nothing.

    python data/miniclip/train.py --out out/miniclip            about 70 minutes on two CPU cores
    python data/miniclip/train.py --out out/miniclip --steps 60 a rehearsal

Then ``text.py`` trains the text tower that ships.

Contrastive learning as CLIP's, with one change: a caption is a positive for every image of which
it is true (``captions.py``), and only for those. If every image of a class counted, the text tower
would learn to ignore the words around the class name, and there would be no prompt to tune. Each
step also contrasts the images with one neutral caption of *every* class ("a photo of a cat.", true
of all cats and of nothing else).

The image tower starts as a classifier with a linear head that is thrown away, as many CLIPs start
from a supervised tower: with a text tower that knows nothing yet, both learn several times slower.
Images and captions of a step depend on (seed, step) only: a killed run continues from its last
checkpoint as if nothing had happened.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import captions as C  # noqa: E402

from tpt_nb import models  # noqa: E402
from tpt_nb.core.machine import has_gpu  # noqa: E402
from tpt_nb.datasets import iconshift  # noqa: E402

BANK_SIDE = 128  # scenes are painted at this size and cropped to the model's 64 px
BANK_SCENES = 30_000
BANK_STEPS = 1_200  # then fresh scenes are painted


# --- images --------------------------------------------------------------------------------------


def _paint(index: int) -> tuple[np.ndarray, dict]:
    s = iconshift.spec("iconshift-train", index)
    image = np.asarray(iconshift.compose(s, BANK_SIDE))
    del s["paint"]
    return image, s


def paint_bank(number: int, scenes: int) -> tuple[torch.Tensor, list[dict]]:
    """Bank ``number`` of training scenes: uint8 ``[N,3,128,128]`` and their parameters.

    The scene at row i shows class i % 200.
    """
    images = torch.empty(scenes, 3, BANK_SIDE, BANK_SIDE, dtype=torch.uint8)
    specs = []
    start = number * BANK_SCENES
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        painted = pool.imap(_paint, range(start, start + scenes), chunksize=200)
        for i, (image, s) in enumerate(painted):
            images[i] = torch.from_numpy(image).permute(2, 0, 1)
            specs.append(s)
    return images, specs


def crop_box(s: dict, whole: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """A square crop (left, top, side, as shares) that keeps at least 70 % of the object's frame.

    ``whole`` is the probability of the whole image.
    """
    for _ in range(10):
        side = 1.0 if rng.random() < whole else math.sqrt(rng.uniform(0.4, 1.0))
        left, top = rng.uniform(0, 1 - side), rng.uniform(0, 1 - side)
        seen = 1.0
        for a, low in ((s["left"], left), (s["top"], top)):
            seen *= max(0.0, min(a + s["side"], low + side) - max(a, low)) / s["side"]
        if seen >= 0.7:
            return left, top, side
    return 0.0, 0.0, 1.0


def treat(images: torch.Tensor, treatments: list[str], rng: np.random.Generator) -> torch.Tensor:
    """Grey, inverted, blurred, dark, bright, thresholded, edges only; in place."""
    grey = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    for i, kind in enumerate(treatments):
        if kind == "gray":
            images[i] = grey[i]
        elif kind == "inverted":
            images[i] = 1 - images[i]
        elif kind == "blurry":
            size = int(rng.integers(18, 36))
            small = F.interpolate(images[i : i + 1], (size, size), mode="bilinear", antialias=True)
            images[i] = F.interpolate(small, images.shape[-2:], mode="bilinear")[0]
        elif kind == "dark":
            images[i] *= rng.uniform(0.25, 0.5)
        elif kind == "bright":
            images[i] = 1 - (1 - images[i]) * rng.uniform(0.3, 0.55)
        elif kind == "stencil":
            level = torch.quantile(grey[i], float(rng.uniform(0.3, 0.7)))
            images[i] = ((grey[i] > level) ^ bool(rng.random() < 0.15)).float()
        elif kind == "outline":
            padded = F.pad(grey[i : i + 1], (1, 1, 1, 1), mode="replicate")
            dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
            dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
            edge = dx.square() + dy.square()
            level = torch.quantile(edge, float(rng.uniform(0.8, 0.93)))
            images[i] = ((edge[0] <= level) ^ bool(rng.random() < 0.15)).float()
    return images


def warp(images: torch.Tensor, chosen: np.ndarray, rng: np.random.Generator) -> None:
    """Bend the ``chosen`` images by a smooth random field, in place: icons of one thing differ in
    their proportions more than in anything else."""
    side = images.shape[-1]
    field = torch.from_numpy(rng.uniform(-0.12, 0.12, (len(chosen), 2, 4, 4))).float()
    field = F.interpolate(field, (side, side), mode="bicubic", align_corners=True)
    line = torch.linspace(-1, 1, side)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + field.permute(0, 2, 3, 1)
    rows = torch.from_numpy(chosen)
    images[rows] = F.grid_sample(images[rows], grid, padding_mode="reflection", align_corners=True)


# how often a treatment is drawn, given that an image is treated at all
TREATED = {"gray": 0.22, "inverted": 0.12, "blurry": 0.14, "dark": 0.08, "bright": 0.09,
           "stencil": 0.20, "outline": 0.15}  # fmt: skip
# shares of treated images, of uncropped ones, of bent ones and of ones with exchanged channels at
# the end
TREATED_SHARE, WHOLE_SHARE, WARPED_SHARE, RECOLOURED_SHARE = 0.4, 0.5, 0.5, 0.25


def difficulty(step: int, steps: int) -> float:
    """Share of the final crops and treatments, from 0 to 1.

    With all of them from the start, a tower this small takes a thousand steps to find out what an
    object is.
    """
    return min(1.0, max(0.0, step / steps - 0.12) / 0.38)


def with_text(step: int, steps: int) -> bool:
    """Whether the text tower takes part: after the image tower has learned what an object is."""
    return step >= 0.25 * steps


def batch(bank, specs, step: int, args, names: list[str]):
    """Images ``[N,3,64,64]`` in [0,1], captions, which is true of which image ``[N,N]``; a neutral
    caption per class, the class of each image ``[N]`` and what is true of it ``[N,facts]``."""
    rng = np.random.default_rng((args.seed, step))
    chosen = rng.permutation(len(names))[: args.classes]
    per_class = len(specs) // len(names)
    rows = [int(c) + len(names) * int(rng.integers(per_class)) for c in chosen
            for _ in range(args.per_class)]  # fmt: skip
    images, truths, texts, stated = [], [], [], []
    hard = difficulty(step, args.steps)
    treatments = rng.choice(list(TREATED), len(rows), p=list(TREATED.values())).tolist()
    natural = rng.random(len(rows)) >= TREATED_SHARE * hard
    treatments = ["natural" if n else t for n, t in zip(natural, treatments, strict=True)]
    recoloured = rng.random(len(rows)) < RECOLOURED_SHARE * hard
    for row, treatment, exchange in zip(rows, treatments, recoloured, strict=True):
        s = specs[row]
        left, top, side = crop_box(s, 1 - (1 - WHOLE_SHARE) * hard, rng)
        box = [round(v * BANK_SIDE) for v in (top, left, side, side)]
        image = TF.resized_crop(bank[row], *box, [64, 64], antialias=True)
        mirror = rng.random() < 0.5
        image = image.flip(-1) if mirror else image
        images.append(image[rng.permutation(3)] if exchange else image)
        x = (s["left"] + s["side"] / 2 - left) / side
        truths.append(C.facts(
            s["style"], treatment, s["side"] / side, 1 - x if mirror else x,
            (s["top"] + s["side"] / 2 - top) / side, s["texture"], s["angle"], s["clutter"],
            s["gains"] != [100] * 3 or bool(exchange),
        ))  # fmt: skip
        text, facts = C.caption(names[s["target"]], truths[-1], rng)
        texts.append(text)
        stated.append(facts)
    truth = np.stack(truths)
    target = np.array([specs[r]["target"] for r in rows])
    positive = true_of(target, truth, stated)
    images = torch.stack(images).float() / 255
    warp(images, np.flatnonzero(rng.random(len(rows)) < WARPED_SHARE * hard), rng)
    images = treat(images, treatments, rng)
    template = C.NEUTRAL[rng.integers(len(C.NEUTRAL))]
    neutral = [template.format(name) for name in names]
    return images, texts, torch.from_numpy(positive), neutral, torch.from_numpy(target), truth


def true_of(target: np.ndarray, truth: np.ndarray, stated: list[list[int]]) -> np.ndarray:
    """Whether caption j, which says ``stated[j]`` of class ``target[j]``, is true of image i."""
    positive = target[:, None] == target[None]
    for j, facts in enumerate(stated):
        positive[:, j] &= truth[:, facts].all(1)
    return positive


# --- model ---------------------------------------------------------------------------------------


def token_rows(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the tokens that captions can hold, and for every token its row among them, or -1."""
    tokens = open_clip.tokenize(C.vocabulary(names))
    ids = torch.cat([tokens.unique(), torch.tensor([models.SOT, models.EOT])]).unique()
    lookup = torch.full((49408,), -1)
    lookup[ids] = torch.arange(len(ids))
    return ids, lookup


def groups(model) -> list[dict]:
    """Parameters with and without weight decay; those that need no gradient are left out."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay = [p for n, p in named if p.ndim > 1 and "embedding" not in n]
    kept = {id(p) for p in decay}
    rest = [p for _, p in named if id(p) not in kept]
    return [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]


def text_features(model, lookup: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Features of tokenised captions through a table that holds only the rows of our vocabulary."""
    eot = tokens.argmax(1)
    tokens = lookup[tokens[:, : int(eot.max()) + 1]]
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    return models.run_text_tower(model, x, eot)


def contrastive_loss(image, text, positive, scale):
    """Cross-entropy to the uniform distribution over positives, both ways (UniCL, 2204.03610)."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    target = positive.float()
    rows = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    columns = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def expanded(model, ids: torch.Tensor):
    """A copy of the model with the full token table, as ``save_mini`` takes it."""
    full = models.build_mini(0)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    table = torch.zeros_like(full.token_embedding.weight)
    table[ids] = state["token_embedding.weight"]
    full.load_state_dict({**state, "token_embedding.weight": table})
    return full.eval()


@torch.no_grad()
def validate(model, ids, names: list[str], mean, std, n: int = 400) -> dict[str, float]:
    """Zero-shot accuracy on source validation scenes and on small source objects in clutter."""
    full = expanded(model, ids)
    tokens = open_clip.tokenize([f"a photo of a {name}." for name in names])
    text = F.normalize(full.encode_text(tokens), dim=1)
    out = {}
    for variant in ("iconshift-v2", "iconshift-dev"):
        hits = 0
        for start in range(0, n, 100):
            scenes = [iconshift.scene(variant, i) for i in range(start, start + 100)]
            views = torch.stack([TF.pil_to_tensor(im.resize((64, 64), 3)) for im, _ in scenes])
            features = full.encode_image((views / 255 - mean) / std)
            hits += sum((features @ text.T).argmax(1) == torch.tensor([t for _, t in scenes]))
        out[variant] = float(hits) / n
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--classes", type=int, default=64, help="classes in a batch")
    parser.add_argument("--per-class", type=int, default=3, help="images of each")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=BANK_SCENES, help="scenes in memory")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if has_gpu() else "cpu"

    names = iconshift.classnames()
    ids, lookup = token_rows(names)
    lookup = lookup.to(device)

    torch.manual_seed(args.seed)
    model = models.build_mini(args.seed)
    model.token_embedding = torch.nn.Embedding(len(ids), model.positional_embedding.shape[1])
    torch.nn.init.normal_(model.token_embedding.weight, std=0.02)
    model.head = torch.nn.Linear(models.MINI_CONFIG["embed_dim"], len(names))  # for the start only
    model.requires_grad_(True).to(device).train()
    model.visual.to(memory_format=torch.channels_last)
    mean = torch.tensor(models.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(models.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    optimizer = torch.optim.AdamW(groups(model), lr=args.lr, betas=(0.9, 0.98))

    checkpoint, start, seconds = args.out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, seconds = saved["step"], saved["seconds"]
        print(f"resumed at step {start} of {args.steps}", flush=True)
    log = args.out / "log.jsonl"
    bank_number, running, began = -1, [], time.perf_counter() - seconds
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=30):
        if step // BANK_STEPS != bank_number:
            bank_number = step // BANK_STEPS
            bank, specs = paint_bank(bank_number, args.scenes)
        images, texts, positive, neutral, target, _ = batch(bank, specs, step, args, names)
        tokens = open_clip.tokenize(texts).to(device)
        neutral = open_clip.tokenize(neutral).to(device)
        images = ((images - mean) / std).to(device, memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        target, amp = target.to(device), torch.autocast(device, torch.bfloat16)
        with amp:
            image = model.visual(images)
        image = image.float()
        if with_text(step, args.steps):
            with amp:
                classes = text_features(model, lookup, neutral)
                text = text_features(model, lookup, tokens)
            scale = model.logit_scale.exp()
            logits = scale * F.normalize(image, dim=1) @ F.normalize(classes.float(), dim=1).T
            loss = F.cross_entropy(logits, target)
            loss = loss + contrastive_loss(image, text.float(), positive.to(device), scale)
        else:
            loss = F.cross_entropy(model.head(image), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        running.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            print(f"step {done}: loss {np.mean(running[-50:]):.3f}", flush=True)
        if done % 500 == 0 or done == args.steps:
            seconds = time.perf_counter() - began
            model.eval()
            accuracy = validate(model.cpu(), ids, names, mean, std)
            model.to(device).train()
            row = {"step": done, "loss": float(np.mean(running)), "seconds": round(seconds),
                   "scale": float(model.logit_scale.exp()), **accuracy}  # fmt: skip
            running = []
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
            temporary = checkpoint.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "step": done, "seconds": seconds}, temporary)  # fmt: skip
            temporary.replace(checkpoint)
            models.save_mini(expanded(model.cpu(), ids), ids, args.out / "miniclip.safetensors")
            model.to(device)


if __name__ == "__main__":
    main()
