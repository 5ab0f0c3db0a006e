"""Measure the embedded generator and write its card: evaluation.json, samples.png, README.md.

    python data/diffusion/evaluate.py            about five minutes on one CPU core
    python data/diffusion/evaluate.py --card     the card alone, from evaluation.json

All on source validation scenes (`iconshift-v2`): how often MiniCLIP, zero-shot, sees in a variation
the class of the image that it was made from; how near variations are to their image and to one
another, against random crops; what they cost.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tpt_nb import datasets, models  # noqa: E402
from tpt_nb.core.images import view_seed  # noqa: E402
from tpt_nb.core.machine import device_name, versions  # noqa: E402
from tpt_nb.methods import difftpt  # noqa: E402
from tpt_nb.models import Prompts  # noqa: E402
from tpt_nb.views import make_augmenter  # noqa: E402

EACH = 8  # variations of an image
GUIDANCES = (1.0, 2.0, 3.0, 4.0)
STEPS = (1, 2, 4, 25)


def features_of(pictures: torch.Tensor, mini) -> torch.Tensor:
    """Features of small pictures ``[n,3,S,S]`` as views."""
    row = difftpt.Row(len(pictures), mini.image_size)
    return mini.encode_views(row(difftpt.as_row(pictures)))


def numbers(sets: list[torch.Tensor], originals, text, targets) -> dict:
    """Class kept, and means of cosines, over images; ``sets`` has features ``[k,D]`` per image."""
    kept, near, apart = [], [], []
    for f, original, target in zip(sets, originals, targets, strict=True):
        k = len(f)
        kept.append(float(((f @ text.T).argmax(1) == target).float().mean()))
        near.append(float((f @ original).mean()))
        apart.append(float((1 - f @ f.T).sum() / (k * (k - 1))))
    return {
        "class_kept": round(float(np.mean(kept)), 4),
        "cosine_with_image": round(float(np.mean(near)), 4),
        "distance_of_two": round(float(np.mean(apart)), 4),
    }


def measure(n: int) -> dict:
    """All numbers of the card, on n images."""
    known, mini = datasets.load("iconshift-v2", n=n), models.load("mini", device="cpu")
    text = Prompts(mini, known.classnames).text_features()
    images = [known[i][0] for i in range(n)]
    crops = make_augmenter("random", size=mini.image_size, n_aug=EACH)
    views = [crops(im, view_seed(0, i)) for im, i in zip(images, known.ids, strict=True)]
    views = [mini.encode_views(v) for v in views]
    originals = [v[0] for v in views]
    tiny = [difftpt.Row(1, difftpt.SIDE)(im.resize((difftpt.SIDE,) * 2, 3)) for im in images]
    small = [features_of(t, mini)[0] for t in tiny]

    def zero_shot(features):
        return float(((torch.stack(features) @ text.T).argmax(1) == targets).float().mean())

    targets = torch.tensor(known.targets)
    out = {
        "dataset": known.name,
        "n": n,
        "each": EACH,
        "zero_shot": zero_shot(originals),
        "zero_shot_at_32_px": zero_shot(small),
        "crops": numbers([v[1:] for v in views], originals, text, known.targets),
        "settings": [],
    }
    usual = difftpt.MiniGenerator()
    settings = [(usual.steps, g) for g in GUIDANCES] + [(s, usual.guidance) for s in STEPS]
    for steps, guidance in tqdm(settings, desc="settings"):
        generator = difftpt.MiniGenerator(steps, guidance)
        generator.make(images[0], [0])
        began = time.perf_counter()
        made = [
            difftpt.variations(im, EACH, generator, image_id=i)
            for im, i in zip(images, known.ids, strict=True)
        ]
        seconds = (time.perf_counter() - began) / (n * EACH)
        row = numbers([features_of(m, mini) for m in made], originals, text, known.targets)
        row = {"steps": steps, "guidance": guidance, **row, "seconds": round(seconds, 4)}
        out["settings"].append(row)
        if (steps, guidance) == (usual.steps, usual.guidance):
            sheet(images, made, [known.classnames[t] for t in known.targets])
    usual = {"steps": usual.steps, "guidance": usual.guidance, "weights": usual.spec()["weights"]}
    out |= {"usual": usual, "device": device_name("cpu"), "versions": versions()}
    return out


def sheet(images: list, made: list[torch.Tensor], names: list[str]) -> None:
    """samples.png: the first 16 images, taken as they come, each with eight variations."""
    side, gap, line = 64, 4, 12
    width, height = 9 * (side + gap) + 3 * gap, side + gap + line
    canvas = Image.new("RGB", (2 * width, 8 * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i in range(min(16, len(images))):
        x, y = i // 8 * width, i % 8 * height
        draw.text((x + 2, y), names[i], fill="black")
        cells = [images[i]] + [Image.fromarray(m.permute(1, 2, 0).numpy()) for m in made[i]]
        for k, cell in enumerate(cells):
            left = x + k * (side + gap) + (2 * gap if k else 0)
            canvas.paste(cell.resize((side, side), Image.Resampling.BICUBIC), (left, y + line))
    canvas.quantize(256, dither=Image.Dither.NONE).save(HERE / "samples.png", optimize=True)


def card(found: dict, log: list[dict]) -> None:
    """Write the numbers into README.md, between its marks."""
    last = log[-1]
    training = (
        f"{last['step']:,} steps of 64 pairs, {last['seconds'] / 60:.0f} minutes on one CPU core "
        f"(bfloat16 autocast). Loss on held-out scenes: "
        + ", ".join(f"{r['held_out']:.4f} after {r['step']:,}" for r in log[1::2] + log[-1:])
        + "."
    )
    lines = ["| | class kept | cosine with the image | distance of two | s each |",
             "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip

    def line(name: str, r: dict) -> str:
        values = f"{r['cosine_with_image']:.2f} | {r['distance_of_two']:.2f}"
        seconds = f"{r['seconds']:.3f}" if "seconds" in r else ""
        return f"| {name} | {100 * r['class_kept']:.1f} % | {values} | {seconds} |"

    lines.append(line("random crops (TPT's)", found["crops"]))
    usual = found["usual"]
    for r in found["settings"]:
        name = f"{r['steps']} step{'s' * (r['steps'] > 1)}, guidance {r['guidance']:g}"
        used = r["steps"] == usual["steps"] and r["guidance"] == usual["guidance"]
        lines.append(line(f"**{name}**" if used else name, r))
    head = (
        f"{found['n']} scenes of `{found['dataset']}`, {found['each']} variations each; the images "
        f"themselves are classified correctly in {100 * found['zero_shot']:.0f} % (shrunk to 32 px "
        f"and enlarged again: {100 * found['zero_shot_at_32_px']:.0f} %). Distance is 1 - cosine. "
        "Seconds on one core."
    )
    text = (HERE / "README.md").read_text()
    for mark, new in (("training", training), ("results", head + "\n\n" + "\n".join(lines))):
        begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"
    (HERE / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=50, help="images")
    parser.add_argument("--card", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = HERE / "evaluation.json"
    if not args.card:
        torch.set_num_threads(1)
        path.write_text(json.dumps(measure(args.n), indent=1) + "\n")
    log = [json.loads(row) for row in (HERE / "training.jsonl").read_text().splitlines()]
    card(json.loads(path.read_text()), log)


if __name__ == "__main__":
    main()
