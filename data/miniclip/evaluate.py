"""Measure MiniCLIP on the five variants of IconShift-200; choose the learning rate of its TPT.

    python data/miniclip/evaluate.py --json          prints one JSON object, keyed by variant
    python data/miniclip/evaluate.py --json --n 200  on a class-balanced 200 of each
    python data/miniclip/evaluate.py --choose-lr     on iconshift-v2 and iconshift-dev only
    python data/miniclip/evaluate.py --write         evaluation.json, and the numbers in the cards

64 random-crop views, seed 0, selection ratio 0.1. ``single`` is the prompt "a photo of a {}.",
``ensemble`` the mean over seven templates, ``coop`` the shipped context; ``confident_view``
averages the 10 % most confident views under the single prompt; ``tpt`` and ``tpt_coop`` tune the
context from the single prompt and from CoOp's. Gains are paired: of ``tpt_coop`` over ``coop``, of
the others over ``single``.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tpt_nb import datasets, methods, metrics, models  # noqa: E402
from tpt_nb.features import encode  # noqa: E402
from tpt_nb.models import Prompts, TemplatePrompts  # noqa: E402
from tpt_nb.views import RandomViews  # noqa: E402

VARIANTS = ("iconshift", "iconshift-v2", "iconshift-a", "iconshift-r", "iconshift-sketch")
RATES = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)
RHO = 0.1
FEWER = 500  # images of a variant unless --n says otherwise; of iconshift-a, all


def cell(hits: torch.Tensor, base: torch.Tensor | None = None) -> dict:
    """Accuracy of ``hits`` [N] with its Wilson interval; with ``base``, the paired gain too."""
    n, good = len(hits), int(hits.sum())
    out = {"accuracy": good / n, "ci95": list(metrics.wilson(good, n)), "n": n}
    if base is not None:
        improved, worsened = int((hits & ~base).sum()), int((~hits & base).sum())
        out["gain"] = (improved - worsened) / n
        out["gain_ci95"] = list(metrics.gain_interval(improved, worsened, n))
    return {k: [round(x, 5) for x in v] if isinstance(v, list) else round(v, 5)
            for k, v in out.items()}  # fmt: skip


def encoded(model: models.Clip, variant: str, n: int | None):
    size = len(datasets.load(variant))
    data = datasets.load(variant, n=min(n, size) if n else None)
    return encode(data, model, RandomViews(n_aug=63, size=model.image_size), seed=0)


def measure(model: models.Clip, variant: str, n: int | None, lr: float, coop: Path) -> dict:
    f = encoded(model, variant, n)
    names = datasets.load(variant).classnames
    single, tuned = Prompts(model, names), Prompts(model, names, coop=coop)

    def hits(result: methods.Adapted) -> torch.Tensor:
        return result.logits.argmax(1) == f.targets

    zero = hits(methods.get("zero_shot")(f.features, single))
    zero_coop = hits(methods.get("zero_shot")(f.features, tuned))
    ensemble = hits(methods.get("zero_shot")(f.features, TemplatePrompts(model, names, "seven")))
    vote = hits(methods.get("confident_view")(f.features, single, rho=RHO))
    tpt = hits(methods.get("tpt")(f.features, single, rho=RHO, lr=lr))
    tpt_coop = hits(methods.get("tpt")(f.features, tuned, rho=RHO, lr=lr))
    return {
        "single": cell(zero),
        "ensemble": cell(ensemble),
        "coop": cell(zero_coop),
        "confident_view": cell(vote, zero),
        "tpt": cell(tpt, zero),
        "tpt_coop": cell(tpt_coop, zero_coop),
    }


def text_shift(model: models.Clip, names: list[str], lr: float) -> float:
    """Mean distance that a random sign step of ``lr`` moves the unit-norm text features."""
    prompts = Prompts(model, names)
    sign = torch.randn(prompts.ctx.shape, generator=torch.Generator().manual_seed(0)).sign()
    with torch.no_grad():
        moved = prompts.text_features(prompts.ctx + lr * sign)
        return float((moved - prompts.text_features()).norm(dim=1).mean())


def choose_rate(model: models.Clip, n: int | None, coop: Path) -> dict:
    """Gain of TPT over its own start at several rates, on the two sets kept for choosing."""
    names = datasets.load("iconshift-v2").classnames
    starts = {"single": Prompts(model, names), "coop": Prompts(model, names, coop=coop)}
    curve = []
    sets = {v: encoded(model, v, n or FEWER) for v in ("iconshift-v2", "iconshift-dev")}
    for lr in RATES:
        row = {"lr": lr, "text_shift": round(text_shift(model, names, lr), 4)}
        for variant, f in sets.items():
            for name, prompts in starts.items():
                result = methods.get("tpt")(f.features, prompts, rho=RHO, lr=lr)
                before = (result.logits_before.argmax(1) == f.targets).float().mean()
                after = (result.logits.argmax(1) == f.targets).float().mean()
                row[f"{variant}/{name}"] = round(float(after - before), 4)
        row["mean_gain"] = round(sum(v for k, v in row.items() if "/" in k) / 4, 4)
        curve.append(row)
        print(row, file=sys.stderr, flush=True)
    best = max(curve, key=lambda row: row["mean_gain"])
    return {"tpt_lr": best["lr"], "chosen_on": "iconshift-v2 and iconshift-dev", "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--n", type=int, help="images per variant (default: all of A, 500 of others)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--choose-lr", action="store_true", help="write config.json")
    parser.add_argument("--write", action="store_true", help="write evaluation.json and the cards")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--coop", type=Path, default=HERE / "coop.pth.tar")
    args = parser.parse_args()
    model = models.load(args.model)
    if args.choose_lr:
        chosen = choose_rate(model, args.n, args.coop)
        (HERE / "config.json").write_text(json.dumps(chosen, indent=1) + "\n")
        print(json.dumps({"tpt_lr": chosen["tpt_lr"]}))
        return
    lr = json.loads((HERE / "config.json").read_text())["tpt_lr"]
    began, out = time.perf_counter(), {}
    for variant in VARIANTS:
        n = args.n or (None if variant == "iconshift-a" else FEWER)
        out[variant] = measure(model, variant, n, lr, args.coop)
        if not args.json:
            accuracies = {k: f"{100 * v['accuracy']:.1f}" for k, v in out[variant].items()}
            print(variant, accuracies, flush=True)
    if args.json:
        print(json.dumps(out))
    if args.write:
        about = {"tpt_lr": lr, "seconds": round(time.perf_counter() - began),
                 "torch": torch.__version__, "machine": platform.machine()}  # fmt: skip
        (HERE / "evaluation.json").write_text(json.dumps({**out, "about": about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
