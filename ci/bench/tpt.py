"""What TPT costs, beside what no method can avoid: the image encoder on the views.

    python ci/bench/tpt.py --model RN50 --classes imagenet-a --views 64 --json
    python ci/bench/tpt.py --model mini --json
    python ci/bench/tpt.py --model RN50 --save data/bench_rn50.json   # then: python ci/readme.py

One process times, in turn and repeatedly: the floor (the image encoder on the views of one image,
with the batch size that suits it best), making the views, adaptation as the paper's code does it
(77 tokens, one image at a time, autograd, AdamW) and the fast path. Times are seconds per image,
medians over the repeats; ratios are taken within each repeat, so that a machine that is slow for a
while is slow for both. The fast path has what belongs to the initial context from the call that
warms it up, as in a run; ``once_s`` is what that costs. Full-size models have random weights, on
which no cost depends, and need no download. ``mini`` also runs end to end on IconShift: from
nothing, and from cached features. Every image that the paper path adapts to is also compared with
the fast one.

JSON: device, floor_s, views_s, paper_s, fast_s; ratio_adapt = paper / fast, ratio_end_to_end =
(floor + views + paper) / (floor + views + fast), over_floor = (floor + views + fast) / floor,
memory_ratio = peak memory of the process in the fast / in the paper path; and more, see below.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tpt_nb import datasets, methods, models
from tpt_nb.core.machine import device_name, has_gpu
from tpt_nb.datasets import iconshift
from tpt_nb.features import encode
from tpt_nb.methods import tuning
from tpt_nb.models import Prompts, packed
from tpt_nb.runs import GROUP
from tpt_nb.views import RandomViews, view_seed

TPT = methods.get("tpt")
IMAGE_SIZE = (500, 375)  # of the typical photograph in ImageNet


# --- what is measured ----------------------------------------------------------------------------


def load(name: str, device: str) -> models.Clip:
    """``mini`` as it ships, or an open_clip architecture with random weights."""
    if name == "mini":
        return models.load("mini", device=device)
    architecture = name.replace("/", "-")
    torch.manual_seed(0)
    model = open_clip.create_model(architecture, pretrained=None, force_quick_gelu=True)
    with torch.no_grad():
        model.logit_scale.fill_(float(np.log(100)))
    tokenizer = open_clip.get_tokenizer(architecture)
    return models.wrap(model, name, device=device, tokenizer=tokenizer)


def class_names(which: str) -> list[str]:
    """Of imagenet-a, imagenet-r, iconshift (200 each), imagenet (1000), or so many of ImageNet."""
    if which == "iconshift":
        return iconshift.classnames()
    known = {"imagenet-a": "a", "imagenet-r": "r", "imagenet": ""}
    if which in known:
        return list(datasets.imagenet_classes(known[which]).values())
    if which.isdigit() and 1 <= int(which) <= 1000:  # the 200 of ImageNet-A first, then the others
        some = list(datasets.imagenet_classes("a").values())
        rest = [n for n in datasets.imagenet_classes().values() if n not in some]
        return [*some, *rest][: int(which)]
    raise SystemExit(f"--classes {which}: give {', '.join(known)}, iconshift or 1 to 1000")


def photograph(seed: int = 0) -> Image.Image:
    """An image of the size of a photograph; the time does not depend on what it shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(IMAGE_SIZE, Image.Resampling.BICUBIC)


def near_features(prompts: Prompts, images: int, views: int) -> torch.Tensor:
    """Unit-norm features near the text features, ``[B,V,D]``: entropies and predictions vary."""
    generator = torch.Generator().manual_seed(0)
    text = prompts.text_features().float().cpu()
    centre = text[torch.randint(len(text), (images,), generator=generator)]
    noise = torch.randn(images, views, text.shape[1], generator=generator)
    return F.normalize(centre[:, None] + 0.05 * noise, dim=-1).to(prompts.clip.device)


# --- measuring -----------------------------------------------------------------------------------


def clock(function: Callable, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(function: Callable, device: torch.device) -> int | None:
    """Peak memory in bytes during one call: of the GPU, or of the process (Linux), else None."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except (OSError, AttributeError):
        function()
        return None
    function()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def flops(function: Callable) -> int:
    """Floating-point operations of matrix products and convolutions in one call."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # an operation of its own, which is not counted
    try:
        with FlopCounterMode(display=False) as counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def processor() -> str:
    """What the CPU calls itself, where Linux says so."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def spread(values: list[float]) -> dict:
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def best_batch(clip: models.Clip, views: torch.Tensor, quick: bool) -> int:
    """The batch size at which the image encoder is fastest on these views, of some."""
    sizes = {len(views), *(() if quick else (16, 32))}
    if len(sizes) == 1:
        return len(views)
    seconds = {b: clock(lambda b=b: clip.encode_views(views, batch=b), clip.device) for b in sizes}
    return min(seconds, key=seconds.get)


# --- the benchmark -------------------------------------------------------------------------------


def bench(args: argparse.Namespace, say: Callable) -> dict:
    clip = load(args.model, args.device)
    device = clip.device
    names = class_names(args.classes)
    prompts = Prompts(clip, names)
    lr = tuning.usual_learning_rate(args.model)
    augmenter = RandomViews(n_aug=args.views - 1, size=clip.image_size)
    image = photograph() if args.model != "mini" else datasets.load("iconshift-a", n=1)[0][0]
    views = augmenter(image, 0)
    n_fast = args.batch or (8 if args.model == "mini" or device.type == "cuda" else 1)
    near = near_features(prompts, max(n_fast, args.repeats + 1), args.views)
    features = near[:n_fast]
    tokens = [len(name) + len(rest) for name, rest in prompts.tokens]
    say(
        f"{clip.name}, {len(names)} classes, {args.views} views, {device_name(str(device))}, "
        f"{torch.get_num_threads()} threads; a prompt has {2 + prompts.M + max(tokens)} tokens at "
        f"most, {2 + prompts.M + statistics.mean(tokens):.2f} on average, of which "
        f"{1 + prompts.M} are shared"
    )

    def do_fast():
        return TPT(features, prompts, lr=lr)

    paper: list[methods.Adapted] = []

    def do_paper():  # the next image each time
        one = near[len(paper) : len(paper) + 1]
        paper.append(TPT(one, prompts, lr=lr, exact="paper"))

    do_fast()  # warms up
    once = clock(lambda: tuning.Start(Prompts(clip, names), by_matrix=False), device)
    batch = best_batch(clip, views, args.quick)
    clip.encode_views(views[: min(8, len(views))])
    memory = {"paper": peak(do_paper, device)}  # and its warm-up
    memory["fast"] = peak(do_fast, device)
    samples: dict[str, list[float]] = {k: [] for k in ("floor", "views", "paper", "fast")}
    for _ in range(args.repeats):
        samples["floor"].append(clock(lambda: clip.encode_views(views, batch=batch), device))
        samples["views"].append(clock(lambda: augmenter(image, 0), device))
        samples["fast"].append(min(clock(do_fast, device) for _ in range(2)) / n_fast)
        samples["paper"].append(clock(do_paper, device))
        say("  " + ", ".join(f"{k} {v[-1]:.4f} s" for k, v in samples.items()))

    fast = TPT(near[: len(paper)], prompts, lr=lr)
    each = [dict(zip(samples, row, strict=True)) for row in zip(*samples.values(), strict=True)]
    ratios = {
        "ratio_adapt": [s["paper"] / s["fast"] for s in each],
        "ratio_end_to_end": [
            (s["floor"] + s["views"] + s["paper"]) / (s["floor"] + s["views"] + s["fast"])
            for s in each
        ],
        "over_floor": [(s["floor"] + s["views"] + s["fast"]) / s["floor"] for s in each],
    }
    out = {
        "device": device_name(str(device)),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": args.model,
        "classes": len(names),
        "views": args.views,
        "repeats": args.repeats,
        "encoder_batch": batch,
        "once_s": once,
        **{f"{k}_s": statistics.median(v) for k, v in samples.items()},
        **{k: statistics.median(v) for k, v in ratios.items()},
        "memory_ratio": memory["fast"] / memory["paper"] if all(memory.values()) else None,
        "memory_bytes": memory,
        "spread": {k: spread(v) for k, v in {**samples, **ratios}.items()},
        "tflop": counted(clip, prompts, views, features, lr),
        "agreement": agreement(fast, paper),
    }
    return out


def agreement(fast: methods.Adapted, paper: list[methods.Adapted]) -> dict:
    """Do the two paths say the same? The paper path has an entry per image."""
    logits, selected = (torch.cat([getattr(p, k) for p in paper]) for k in ("logits", "selected"))
    return {
        "images": len(paper),
        "largest_logit_difference": float((fast.logits - logits).abs().max()),
        "same_prediction": bool((fast.logits.argmax(1) == logits.argmax(1)).all()),
        "same_selection": bool((fast.selected == selected).all()),
    }


def counted(clip, prompts: Prompts, views, features, lr: float) -> dict:
    """Operations per image, in 10^12; of the paper path on a few classes, for all of them."""
    few = Prompts(clip, prompts.classnames[: min(8, prompts.C)])
    some = near_features(few, 1, features.shape[1])
    per_class = flops(lambda: TPT(some, few, lr=lr, exact="paper")) / few.C
    return {
        "floor": flops(lambda: clip.encode_views(views[:1])) * len(views) / 1e12,
        "paper": per_class * prompts.C / 1e12,
        "fast": counted_fast(prompts, features[:1], lr),
    }


def counted_fast(prompts: Prompts, features: torch.Tensor, lr: float) -> float:
    """Operations of the fast path for one image, in 10^12, in products that a counter knows."""
    laid_out = packed.lay_out
    packed.lay_out = lambda weight: None
    try:
        plain = Prompts(prompts.clip, prompts.classnames)
        TPT(features, plain, lr=lr)
        return flops(lambda: TPT(features, plain, lr=lr)) / 1e12
    finally:
        packed.lay_out = laid_out


def end_to_end(args: argparse.Namespace, say: Callable) -> dict:
    """``mini`` on IconShift-A as a run does it: from nothing, and again from cached features."""
    clip = load("mini", args.device)
    data = datasets.load("iconshift-a", n=args.images)
    augmenter = RandomViews(n_aug=args.views - 1, size=clip.image_size)
    lr = tuning.usual_learning_rate("mini")

    def tune(features, kept: str | None = None) -> list:
        prompts = Prompts(clip, data.classnames)
        prompts.expect(len(features), kept)
        return [TPT(x.to(clip.device), prompts, lr=lr) for _, x, _ in features.batches(GROUP)]

    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        features = encode(data, clip, augmenter, cache=cache, progress=False)
        encoded = time.perf_counter()
        first = tune(features)
        from_nothing = time.perf_counter() - began
        say(f"  from nothing: {from_nothing:.1f} s, {encoded - began:.1f} s of it for the features")
        again = time.perf_counter()
        features = encode(data, clip, augmenter, cache=cache, progress=False)
        second = tune(features)
        from_cache = time.perf_counter() - again
        say(f"  from cached features: {from_cache:.1f} s")
        prompts = Prompts(clip, data.classnames)
        once = clock(lambda: prompts.jacobian(cache), clip.device)
        third = time.perf_counter()
        features = encode(data, clip, augmenter, cache=cache, progress=False)
        tune(features, kept=cache)
        from_both = time.perf_counter() - third
        say(f"  from cached features and a kept Jacobian: {from_both:.1f} s")
    sample = [data[i][0] for i in range(min(32, len(data)))]
    seconds = {
        "images_s": clock(lambda: [data[i] for i in range(len(sample))], clip.device) / len(sample)
    }
    made = [augmenter(image, view_seed(0, data.ids[i])) for i, image in enumerate(sample)]
    seconds["views_s"] = clock(
        lambda: [augmenter(x, view_seed(0, data.ids[i])) for i, x in enumerate(sample)], clip.device
    ) / len(sample)
    seconds["floor_s"] = clock(lambda: [clip.encode_views(v) for v in made], clip.device) / len(
        sample
    )
    same = all(torch.equal(a.logits, b.logits) for a, b in zip(first, second, strict=True))
    logits = torch.cat([a.logits for a in second]).cpu()
    return {
        "images": len(features),
        "from_nothing_s": from_nothing,
        "from_cache_s": from_cache,
        "from_cache_per_image_s": from_cache / len(features),
        "from_cache_with_jacobian_s": from_both,
        "jacobian_once_s": once,
        "per_image": seconds,
        "accuracy": float((logits.argmax(1) == features.targets).float().mean()),
        "repeats_to_the_bit": same,
    }


def chart(result: dict, path: Path) -> None:
    """Where the time of an image goes, before and after."""
    from tpt_nb import figures  # here: matplotlib would count as memory of what is measured

    figures.setup()
    r = result
    parts = {
        "image encoder": [r["floor_s"], r["floor_s"]],
        "views": [r["views_s"], r["views_s"]],
        "adaptation": [r["paper_s"], r["fast_s"]],
    }
    title = f"{r['model']}, {r['classes']} classes, {r['views']} views: {r['device']}"
    fig = figures.stacked(["paper path", "fast path"], parts, "seconds per image", title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figures.to_png(fig))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="RN50", help="mini, RN50, ViT-B/16, any of open_clip")
    parser.add_argument("--classes", default="", help="imagenet-a, imagenet, iconshift, a number")
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=0, help="3; with --quick 1 (mini 3)")
    parser.add_argument("--batch", type=int, default=0, help="images per call of the fast path")
    parser.add_argument("--images", type=int, default=0, help="mini end to end: 1000, quick 200")
    parser.add_argument("--device", default="cuda" if has_gpu() else "cpu")
    parser.add_argument("--quick", action="store_true", help="under three minutes on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON there too")
    parser.add_argument("--note", default="", help="what should be known about this run")
    parser.add_argument("--chart", type=Path, help="write a PNG of where the time goes")
    args = parser.parse_args()
    args.classes = args.classes or ("iconshift" if args.model == "mini" else "imagenet-a")
    args.repeats = args.repeats or (1 if args.quick and args.model != "mini" else 3)
    args.images = args.images or (200 if args.quick else 1000)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    began = time.perf_counter()
    result = bench(args, say)
    if args.model == "mini":
        result["end_to_end"] = end_to_end(args, say)
    result |= {"note": args.note, "bench_s": time.perf_counter() - began}
    if args.save:
        args.save.write_text(json.dumps(result, indent=1) + "\n")
    if args.chart:
        chart(result, args.chart)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        report(result)
    return 0


def report(r: dict) -> None:
    """The result for people."""
    print(f"{'once_s':<18}{r['once_s']:10.4f}")
    for key in ("floor_s", "views_s", "paper_s", "fast_s"):
        s = r["spread"][key.removesuffix("_s")]
        print(f"{key:<18}{r[key]:10.4f}  ({s['low']:.4f} to {s['high']:.4f})")
    for key in ("ratio_adapt", "ratio_end_to_end", "over_floor"):
        s = r["spread"][key]
        print(f"{key:<18}{r[key]:10.2f}  ({s['low']:.2f} to {s['high']:.2f})")
    if r["memory_ratio"]:
        gigabytes = {k: v / 2**30 for k, v in r["memory_bytes"].items()}
        print(
            f"{'memory_ratio':<18}{r['memory_ratio']:10.2f}  ({gigabytes['fast']:.2f} of "
            f"{gigabytes['paper']:.2f} GB)"
        )
    for name, value in r["tflop"].items():
        rate = 1000 * value / r[f"{name}_s"]
        print(f"{name:<18}{1000 * value:10.2f} GFLOP, {rate:.0f} GFLOP/s")
    a = r["agreement"]
    print(
        f"agreement on {a['images']} images: predictions {a['same_prediction']}, selected views "
        f"{a['same_selection']}, logits within {a['largest_logit_difference']:.1e}"
    )
    for key, value in r.get("end_to_end", {}).items():
        print(f"{key:<24}{value}")


if __name__ == "__main__":
    sys.exit(main())
