"""Train the CoOp context that ships with MiniCLIP: 16 shots a class of source scenes, M=4.

    python data/miniclip/coop.py        writes coop.pth.tar and coop.json (some minutes on a CPU)

The scenes come from ``iconshift-train`` far behind the indices that trained MiniCLIP. Of the rates
tried, the one with the best accuracy on ``iconshift-v2`` and ``iconshift-dev`` together is kept.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tpt_nb import models  # noqa: E402
from tpt_nb.core.images import view_seed  # noqa: E402
from tpt_nb.datasets import iconshift  # noqa: E402
from tpt_nb.models import Prompts, save_coop, train_coop  # noqa: E402
from tpt_nb.views import RandomViews  # noqa: E402

FIRST = 20_000_000  # index of the first scene; a multiple of 200, so that classes come in turn
SHOTS = 16
AUGMENTED = 10  # crops per image, of which every epoch draws one


def shots(model: models.Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[N,A,D]`` and targets ``[N]`` of the few-shot training set."""
    augment = RandomViews(n_aug=AUGMENTED - 1, size=model.image_size)
    features, targets = [], []
    for i in range(FIRST, FIRST + SHOTS * len(iconshift.classnames())):
        s = iconshift.spec("iconshift-train", i)
        views = augment(iconshift.compose(s), view_seed(0, f"coop/{i}"))
        features.append(model.encode_views(views))
        targets.append(s["target"])
    return torch.stack(features), torch.tensor(targets)


def accuracy(model: models.Clip, ctx: torch.Tensor | None, sets: dict) -> dict[str, float]:
    """Top-1 of view 0 under a context (None: "a photo of a") on encoded sets."""
    text = Prompts(model, iconshift.classnames()).text_features(ctx)
    return {
        name: round(float(((features @ text.T).argmax(1) == targets).float().mean()), 4)
        for name, (features, targets) in sets.items()
    }


def validation(model: models.Clip, n: int = 1000) -> dict:
    """Variant -> (features of view 0 ``[N,D]``, targets ``[N]``)."""
    centre = RandomViews(n_aug=0, size=model.image_size)
    out = {}
    for variant in ("iconshift-v2", "iconshift-dev"):
        scenes = [iconshift.scene(variant, i) for i in range(n)]
        views = torch.cat([centre(image, 0) for image, _ in scenes])
        out[variant] = (model.encode_views(views), torch.tensor([t for _, t in scenes]))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.002, 0.02])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    began = time.perf_counter()
    model = models.load(args.model)
    features, targets = shots(model)
    sets = validation(model)
    tried = [{"lr": None, **accuracy(model, None, sets)}]
    best = None
    for lr in args.lr:
        ctx = train_coop(
            model, features, targets, iconshift.classnames(), epochs=args.epochs, lr=lr, seed=0
        )
        tried.append({"lr": lr, **accuracy(model, ctx, sets)})
        print(tried[-1], flush=True)
        score = tried[-1]["iconshift-v2"] + tried[-1]["iconshift-dev"]
        if best is None or score > best[0]:
            best = (score, lr, ctx)
    save_coop(args.out / "coop.pth.tar", best[2], args.epochs)
    report = {"shots": SHOTS, "epochs": args.epochs, "lr": best[1], "tried": tried,
              "seconds": round(time.perf_counter() - began)}  # fmt: skip
    (args.out / "coop.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
