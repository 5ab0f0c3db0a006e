"""How the cost of TPT grows with classes, views and steps, beside that of the image encoder.

    python ci/bench/growth.py --save data/bench_growth.json      # half an hour of one core
    python ci/bench/growth.py --models mini --classes 10 20 --views 2 4 --steps 1 2

For each model the floor, the image encoder on the views of one image, is measured once per number
of views; the views themselves too. Then each cell, one image at a time: ``alone_s`` is an image of
a few (its gradient goes through the text tower), ``run_s`` an image of many with one step (its
gradient is its share of one product with the Jacobian, which such a run makes once and keeps; here
the matrix has any numbers, on which no time depends). ``over_floor`` is (floor + views + alone) /
floor, ``over_floor_run`` the same in such a run; None where a quarter of the free memory does not
hold the matrix, as the program itself decides.

Weights are random, times are medians of ``--repeats`` (one for what takes more than 5 s). On a CPU
they are processor seconds of one thread, which other jobs on the machine change little; on a GPU
seconds by the clock. Cells come from the cheapest to the dearest, and what ``--minutes`` leaves no
time for is left out and named.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tpt import TPT, class_names, clock, load, near_features, photograph, processor

from tpt_nb import models
from tpt_nb.core.machine import device_name, has_gpu
from tpt_nb.methods import tuning
from tpt_nb.models import Prompts
from tpt_nb.views import RandomViews

PRODUCT = 32  # images that share one product with the Jacobian in a run


def seconds(function: Callable, device: torch.device) -> float:
    """Of one call: of the processor, or by the clock where a GPU computes."""
    if device.type == "cuda":
        return clock(function, device)
    began = time.process_time()
    function()
    return time.process_time() - began


def median_of(function: Callable, device: torch.device, repeats: int) -> float:
    """Seconds; one measurement is enough for what takes long."""
    values = [seconds(function, device)]
    while len(values) < repeats and values[0] < 5:
        values.append(seconds(function, device))
    return statistics.median(values)


def floors(clip: models.Clip, counts: list[int], repeats: int) -> dict[int, dict[str, float]]:
    """Seconds to encode, and to make, so many views of one image."""
    out, image = {}, photograph()
    clip.encode_views(RandomViews(n_aug=1, size=clip.image_size)(image, 0))
    for n in counts:
        make = RandomViews(n_aug=n - 1, size=clip.image_size)
        views = make(image, 0)
        out[n] = {
            "floor_s": median_of(lambda: clip.encode_views(views, batch=16), clip.device, repeats),  # noqa: B023
            "views_s": median_of(lambda: make(image, 0), clip.device, repeats),  # noqa: B023
        }
    return out


def give_jacobian(prompts: Prompts) -> bool:
    """A matrix in place of the Jacobian, if a run over very many images would make it."""
    prompts.expect(1_000_000)
    fits = tuning.worth_a_jacobian(prompts, 1)
    prompts.expect()
    if fits:
        d = prompts.clip.ctx_dim
        matrix = torch.full((prompts.C, d, prompts.M * d), 1e-3, device=prompts.clip.device)
        prompts.once("jacobian", lambda: matrix)
    return fits


@torch.no_grad()
def in_a_run(prompts: Prompts, features: torch.Tensor, repeats: int) -> float:
    """Seconds per image where the gradients of many images are one product with the Jacobian."""
    start, scale = tuning.Start(prompts, by_matrix=True), prompts.clip.logit_scale
    x = features.expand(PRODUCT, -1, -1).to(start.text)
    logits = scale * x @ start.text.T
    g, device = logits.softmax(-1), prompts.clip.device
    prompts.text_features(start.ctx[None])  # what is laid out once
    product = median_of(lambda: start.pull_back(g, logits, x, scale), device, repeats)
    tuned = median_of(lambda: prompts.text_features(start.ctx[None]), device, repeats)
    return tuned + product / PRODUCT


def cell(prompts: Prompts, floor: dict, views: int, steps: int, fits: bool, repeats: int) -> dict:
    """One cell of the table; ``fits``: the prompts have a Jacobian."""
    features = near_features(prompts, 1, views)

    def alone():
        TPT(features, prompts, lr=tuning.LR, steps=steps)

    first = seconds(alone, prompts.clip.device)  # makes what belongs to the start
    out = {"classes": prompts.C, "views": views, "steps": steps}
    slow = steps > 1 and first > 5  # several steps make nothing that the next image would find
    out["alone_s"] = first if slow else median_of(alone, prompts.clip.device, repeats)
    out["run_s"] = in_a_run(prompts, features, repeats) if fits and steps == 1 else None
    base = floor["floor_s"] + floor["views_s"]
    out["over_floor"] = (base + out["alone_s"]) / floor["floor_s"]
    run = out["run_s"]
    out["over_floor_run"] = None if run is None else (base + run) / floor["floor_s"]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["RN50", "ViT-B/16"])
    parser.add_argument("--classes", nargs="+", type=int, default=[50, 200, 1000])
    parser.add_argument("--views", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=12, help="stop before the next cell then")
    parser.add_argument("--device", default="cuda" if has_gpu() else "cpu")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table there")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.device == "cpu":
        torch.set_num_threads(1)
    result = {
        "device": device_name(args.device), "processor": processor(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "repeats": args.repeats, "floors": {}, "cells": [],
        "left_out": [],
    }  # fmt: skip
    clips = {}
    for name in args.models:
        clips[name] = load(name, args.device)
        result["floors"][name] = floors(clips[name], args.views, args.repeats)
        print(name, result["floors"][name], file=sys.stderr, flush=True)
    # the cheap cells of all models first, so that a slow machine lacks the dearest ones
    for steps, n in itertools.product(sorted(args.steps), sorted(args.classes)):
        for name, clip in clips.items():
            prompts = Prompts(clip, class_names(str(n)))
            fits = steps == 1 and give_jacobian(prompts)
            for views in args.views:
                floor = result["floors"][name][views]
                if time.perf_counter() - began > 60 * args.minutes:
                    result["left_out"].append([name, n, views, steps])
                    continue
                row = {"model": name} | cell(prompts, floor, views, steps, fits, args.repeats)
                result["cells"].append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    result["bench_s"] = time.perf_counter() - began
    if args.save:
        args.save.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
