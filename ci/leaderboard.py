"""Every method on the same views: one table over the variants of IconShift, or any data sets.

    python ci/leaderboard.py --variants all --n 1000 --seeds 3 --json
    python ci/leaderboard.py --variants iconshift-a --methods vote zero mta --n 200
    python ci/leaderboard.py --variants imagenet-a --model RN50 --root PATH
    python ci/leaderboard.py --variants all --n 1000 --seeds 3 --write

Each (variant, seed of the views) is encoded once and cached; every row then sees the same features.
Rows are the methods of ``adapt.METHODS`` under one prompt, so that a new method is in the table
without a change here, and some of them under other prompts (``MORE``). What a row predicted for a
(variant, seed) is kept in ``--out``; a run that was killed goes on, one that is repeated computes
nothing. Results of another model, or of code that was changed since (the hash of ``tpt_nb``'s
methods is part of the name), are not used.

``--cluster local|ADDRESS`` spreads it with Ray (``tpt_nb.cluster``): the features shard by shard,
then a task per row, variant and seed. Rows that share cores are slower: seconds to be published
come from a run without it.

Accuracies are means over the seeds; intervals come from drawing images again (each image counts
with its mean over the seeds, so that seeds do not make images more than they are). Online methods
are run over ``--orders`` orders per seed. Seconds are of this machine; adapting is timed in batches
of 32 from encoded features, encoding apart. Memory is the peak of what a batch of 8 allocates,
divided by 8. ``--write`` stores the table where notebook 10 reads it.
"""

import argparse
import hashlib
import inspect
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from tpt_nb import (
    core,
    datasets,
    methods,
    metrics,  # noqa: E402
    models,  # noqa: E402
    runs,
)
from tpt_nb.__main__ import add_cluster_options  # noqa: E402
from tpt_nb.core.paths import DATA  # noqa: E402
from tpt_nb.features import encode  # noqa: E402
from tpt_nb.models import Prompts, TemplatePrompts  # noqa: E402
from tpt_nb.views import RandomViews  # noqa: E402

VARIANTS = ("iconshift", "iconshift-v2", "iconshift-a", "iconshift-r", "iconshift-sketch")
SHIFTED = [f"{d}-{v}" for d in ("iconshift", "imagenet") for v in ("a", "r", "sketch")]
STORED = DATA / "leaderboard.json"
GROUP = 32
BINS = 15
# rows beyond "every method with one prompt": (method, prompt)
MORE = [
    ("zero_shot", "seven"),
    ("zero_shot", "eighty"),
    ("zero_shot", "coop"),
    ("vote", "seven"),
    ("vote", "coop"),
    ("tpt", "coop"),
]
PUBLISHED = ("zero", "zero_fp16", "mta", "tps", "tpt", "rtpt", "ctpt")  # episodic, with a paper


@dataclass(frozen=True)
class Row:
    """A line of the table: a method under a prompt, with parameters other than its own."""

    method: str
    prompt: str = "single"
    params: dict = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        extra = ",".join(f"{k}={v:g}" for k, v in self.params.items())
        label = self.method if self.prompt == "single" else f"{self.method} + {self.prompt}"
        return f"{label} ({extra})" if extra else label


def all_rows(model: str) -> list[Row]:
    """Every registered method that needs features and prompts alone, then ``MORE``.

    The 80 templates are left out for the embedded model: it has never seen most of their words.
    """
    plain = [Row(name) for name, method in methods.METHODS.items() if not hasattr(method, "bind")]
    more = [Row(m, p) for m, p in MORE if p != "eighty" or model != "mini"]
    return plain + more


def make_prompts(kind: str, clip, classnames: list[str], coop: str):
    """The prompts of a row: "single", "coop", or a template ensemble."""
    if kind == "single":
        return Prompts(clip, classnames)
    if kind == "coop":
        return Prompts(clip, classnames, coop=coop)
    return TemplatePrompts(clip, classnames, kind)


def call(row: Row, lr: float, seed: int, n_images: int | None = None):
    """``features, prompts -> Adapted`` with the row's parameters."""
    method = methods.METHODS[row.method]
    takes = inspect.signature(method).parameters
    params = {"lr": lr, "seed": seed, "n_images": n_images}
    params = {k: v for k, v in params.items() if k in takes} | row.params
    return lambda features, prompts: method(features, prompts, **params)


def measure(row: Row, features, prompts, lr: float, device, orders: int, seed: int) -> dict:
    """Predictions of a row for all images: lists of N, and seconds of adapting."""
    online = getattr(methods.METHODS[row.method], "online", False)
    parts, began = [], time.perf_counter()
    if online:
        seeds = [seed * orders + k for k in range(orders)]
        whole = features.features.to(device)
        parts = [[call(row, lr, s)(whole, prompts).logits.cpu()] for s in seeds]
    else:
        run = call(row, lr, seed, len(features))
        parts = [[run(v.to(device), prompts).logits.cpu() for _, v, _ in features.batches(GROUP)]]
    seconds = (time.perf_counter() - began) / len(parts)
    probs = torch.stack([torch.cat(p).double().softmax(-1) for p in parts])  # [orders,N,C]
    confidence, predicted = probs.max(-1)
    right = (predicted == features.targets).double()
    target = features.targets.expand(len(parts), -1)[..., None]
    return {
        "predicted": predicted[0].tolist(),
        "correct": [round(x, 4) for x in right.mean(0).tolist()],
        "correct_first": [int(x) for x in right[0].tolist()],
        "confidence": [round(x, 5) for x in confidence[0].tolist()],
        "log_prob": [
            round(x, 4)
            for x in probs.gather(-1, target)[..., 0].clamp_min(1e-45).log().mean(0).tolist()
        ],
        "seconds": round(seconds, 4),
        "spread_orders": round(float(right.mean(1).std()) if len(parts) > 1 else 0.0, 5),
    }


def peak_memory(row: Row, features, prompts, lr: float, device, images: int = 8) -> float:
    """Bytes per image that adapting allocates at its peak, beyond features and text features."""
    batch = features.features[:images].to(device)
    run = call(row, lr, 0)
    run(batch, prompts)
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(batch, prompts)
        return (torch.cuda.max_memory_allocated() - before) / len(batch)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(batch, prompts)
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    level = np.cumsum([nbytes for _, nbytes in sorted(changes)])
    return float(level.max(initial=0)) / len(batch)


def code_hash() -> str:
    """Of the code that predictions depend on: changed code, other results."""
    names = ("adapt", "methods", "online", "losses", "prompts", "tower")
    texts = [p.read_bytes() for n in names if (p := REPO / "tpt_nb" / f"{n}.py").is_file()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def collect(args, say, mine=lambda *share: True) -> dict:
    """Run what is missing; the raw results: variant -> seed -> label -> measures.

    What is missing is left out where ``mine(variant, seed, label)`` is not true.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip = models.load(args.model, device=device)
    mini = args.model == "mini"
    lr = args.lr or runs.default_learning_rate(args.model)
    coop = args.coop or (str(DATA / "miniclip" / "coop.pth.tar") if mini else "")
    rows = [r for r in all_rows(args.model) if coop or r.prompt != "coop"]
    if args.methods:
        unknown = [m for m in args.methods if m not in methods.METHODS]
        if unknown:
            raise ValueError(core.unknown("method", unknown[0], methods.METHODS))
        rows = [r for r in rows if r.method in args.methods]
    augmenter = RandomViews(n_aug=args.n_aug, size=clip.image_size)
    prompts: dict[tuple, object] = {}
    raw: dict = {}
    about = {"model": args.model, "fingerprint": clip.fingerprint, "lr": lr, "n_aug": args.n_aug,
             "code": code_hash(), "orders": args.orders}  # fmt: skip
    memory: dict[str, float] = {}
    for variant in args.variants:
        whole = len(datasets.load(variant, root=args.root))
        data = datasets.load(variant, n=min(args.n or whole, whole), root=args.root)
        for seed in range(args.seeds):
            key = {k: v for k, v in about.items() if k != "lr"}
            key |= {"variant": variant, "data": data.fingerprint, "n": len(data),
                           "seed": seed}  # fmt: skip
            features = None
            results = raw.setdefault(variant, {})[seed] = {}
            for row in rows:
                takes = inspect.signature(methods.METHODS[row.method]).parameters
                own = {"row": row.label} | ({"lr": lr} if "lr" in takes else {})
                name = json.dumps(key | own, sort_keys=True)
                digest = hashlib.sha256(name.encode()).hexdigest()[:16]
                path = args.out / f"{variant}-{seed}-{digest}.json"
                if path.is_file():
                    results[row.label] = json.loads(path.read_text())
                    continue
                if not mine(variant, seed, row.label):
                    continue
                if features is None:
                    began = time.perf_counter()
                    features = encode(data, clip, augmenter, seed=seed, progress=args.progress)
                    say(f"{variant}, seed {seed}: features, {time.perf_counter() - began:.1f} s")
                which = (row.prompt, tuple(data.classnames))
                if which not in prompts:
                    prompts[which] = make_prompts(row.prompt, clip, data.classnames, coop)
                found = measure(row, features, prompts[which], lr, device, args.orders, seed)
                if row.label not in memory:
                    memory[row.label] = peak_memory(row, features, prompts[which], lr, device)
                found |= {"row": row.label, "method": row.method, "prompt": row.prompt,
                          "bytes": memory[row.label], "encode_seconds": features.seconds,
                          "targets": features.targets.tolist(), "ids": features.ids}  # fmt: skip
                write_json(path, found)
                results[row.label] = found
                accuracy = np.mean(found["correct"])
                say(f"  {row.label:24s} {100 * accuracy:5.1f} %  {found['seconds']:6.2f} s")
    return {"about": about | {"device": core.device_name(device)}, "raw": raw}


def compute(share: tuple) -> dict[str, str]:
    """One (variant, seed, label) in a folder that is thrown away: file name -> content."""
    args, one = share
    with tempfile.TemporaryDirectory() as folder:
        here = argparse.Namespace(**{**args, "out": Path(folder), "variants": [one[0]]})
        collect(here, lambda text: None, lambda *other: other == one)
        return {path.name: path.read_text() for path in Path(folder).glob("*.json")}


def spread(args, say) -> None:
    """Compute what is missing on a cluster; the files come to where ``collect`` looks for them.

    Raises ``ValueError`` for the first row that fails, after all others are done.
    """
    from tpt_nb.scale import cluster

    todo: list[tuple] = []
    collect(args, say, lambda *share: todo.append(share))
    if not todo:
        return
    report, errors = cluster.Report(), []
    with cluster.connect(args.cluster, args.cluster_workers) as nodes:
        device = nodes.device(args.device or "auto")
        jobs = []
        for variant, seed in dict.fromkeys(share[:2] for share in todo):
            whole = len(datasets.load(variant, root=args.root))
            config = runs.RunConfig(
                dataset=variant, model=args.model, root=args.root or "", device=device, seed=seed,
                n_aug=args.n_aug, reduced_size=min(args.n or whole, whole), out=str(args.out),
                method="confident_view",
            )  # fmt: skip
            jobs.append(nodes.job(config, alone=False))
        for found in cluster.prepare(nodes, jobs, report, args.progress).values():
            if isinstance(found, Exception):
                raise found
        say(report.text())
        values = vars(args) | {"device": device, "progress": False}
        shares = [(jobs[0], "leaderboard", "compute", (values, share)) for share in todo]
        for k, files, error in nodes.tasks(cluster.call_script, shares, device, report.retried):
            if error:
                errors.append(f"{todo[k]}: {error}")
                continue
            for name, text in files.items():
                write_json(args.out / name, json.loads(text))
            say(f"  {' '.join(map(str, todo[k]))}")
    if errors:
        raise ValueError(f"{len(errors)} rows failed, the first: {errors[0]}")


def summarise(raw: dict, reference: str = "tpt") -> dict:
    """The table: per row and variant accuracy, ECE and so on; means, gains, wins."""
    variants = list(raw)
    seeds = list(next(iter(raw.values())))
    labels = list(raw[variants[0]][seeds[0]])
    correct = {
        label: {v: np.mean([raw[v][s][label]["correct"] for s in seeds], axis=0) for v in variants}
        for label in labels
    }
    decisive = [v for v in variants if v in SHIFTED] or variants  # their mean decides
    rows = []
    for label in labels:
        one = raw[variants[0]][seeds[0]][label]
        method = methods.METHODS[one["method"]]
        takes = inspect.signature(method).parameters
        line = {
            "row": label,
            "method": one["method"],
            "prompt": one["prompt"],
            "online": bool(getattr(method, "online", False)),
            "tunes": "lr" in takes or "shift" in takes,
            "published": one["method"] in PUBLISHED,
            "variants": {},
        }
        confidence, right = [], []
        for v in variants:
            x = correct[label][v]
            records = [raw[v][s][label] for s in seeds]
            conf = np.concatenate([r["confidence"] for r in records])
            hit = np.concatenate([r["correct_first"] for r in records])
            bins = metrics.reliability(conf, hit, BINS)
            gap = (bins["n"] * (bins["accuracy"] - bins["confidence"]).abs()).sum() / len(conf)
            confidence.append(conf)
            right.append(hit)
            low, high = metrics.bootstrap_difference(np.zeros(len(x)), x, resamples=4000)
            line["variants"][v] = {
                "n": len(x),
                "accuracy": float(x.mean()),
                "ci95": [low, high],
                "by_seed": [float(np.mean(raw[v][s][label]["correct"])) for s in seeds],
                "ece": float(gap),
                "log_prob": float(np.mean([np.mean(r["log_prob"]) for r in records])),
                "seconds": float(np.mean([r["seconds"] for r in records])) / len(x),
                "encode_seconds": float(np.mean([r["encode_seconds"] for r in records])) / len(x),
            }
        per = line["variants"].values()
        line["mean"] = float(np.mean([p["accuracy"] for p in per]))
        line["mean_shifted"] = float(np.mean([line["variants"][v]["accuracy"] for v in decisive]))
        line["ece"] = float(np.mean([p["ece"] for p in per]))
        line["seconds"] = float(np.mean([p["seconds"] for p in per]))
        encoding = float(np.mean([p["encode_seconds"] for p in per]))
        line["encode_seconds"] = encoding
        line["bytes"] = one["bytes"]
        # every data set weighs the same in a diagram, too
        table = metrics.reliability(np.concatenate(confidence), np.concatenate(right), BINS)
        line["reliability"] = {c: [round(float(x), 5) for x in table[c]] for c in table}
        for name in ("zero_shot", reference):
            if name in labels:
                chosen = [correct[name][v] for v in decisive], [correct[label][v] for v in decisive]
                line[f"gain_over_{name}"] = metrics.mean_gain(*chosen)
        rows.append(line)
    wins = {
        a: {b: metrics.mean_gain([correct[b][v] for v in decisive],
                                 [correct[a][v] for v in decisive], resamples=4000)
            for b in labels if b != a}
        for a in labels
    }  # fmt: skip
    absent = [m for m, f in methods.METHODS.items() if m not in labels and not hasattr(f, "bind")]
    return {"variants": variants, "decisive": decisive, "seeds": len(seeds), "rows": rows,
            "absent": absent, "wins": wins}  # fmt: skip


def text_table(table: dict) -> str:
    """The table for people, in per cent."""
    names = table["variants"]
    short = [n.removeprefix("iconshift-") for n in names]
    head = ["row", *short, "mean", "ARS" if len(table["decisive"]) == 3 else "mean*",
            "over zero-shot", "over TPT", "ECE", "ms/img", "MB/img"]  # fmt: skip
    lines = []
    for row in sorted(table["rows"], key=lambda r: -r["mean_shifted"]):
        cells = [row["row"] + (" (online)" if row["online"] else "")]
        cells += [f"{100 * row['variants'][v]['accuracy']:.1f}" for v in names]
        cells += [f"{100 * row['mean']:.1f}", f"{100 * row['mean_shifted']:.1f}"]
        for name in ("zero_shot", "tpt"):
            gain = row.get(f"gain_over_{name}")
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in gain))
                         if gain and row["row"] != name else "")  # fmt: skip
        cells += [f"{100 * row['ece']:.1f}", f"{1000 * row['seconds']:.1f}",
                  f"{row['bytes'] / 2**20:.2f}"]  # fmt: skip
        lines.append(cells)
    widths = [max(len(c[i]) for c in [head, *lines]) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                  for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in [head, *lines]
    )  # fmt: skip


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python ci/leaderboard.py",
                                description=__doc__.split("\n")[0])  # fmt: skip
    p.add_argument("--variants", nargs="+", default=["all"], metavar="NAME",
                   help="data sets; all: the five of IconShift")  # fmt: skip
    p.add_argument("--methods", nargs="+", metavar="NAME", help="default: every one")
    p.add_argument("--n", type=int, default=1000, help="images per variant; 0: all")
    p.add_argument("--seeds", type=int, default=1, help="of the views")
    p.add_argument("--orders", type=int, default=3, help="of the stream per seed, online methods")
    p.add_argument("--n_aug", type=int, default=63, help="crops per image")
    p.add_argument("--model", default="mini")
    p.add_argument("--coop", default="", help="CoOp checkpoint; default: the embedded one for mini")
    p.add_argument("--lr", type=float, help="of the methods that tune a context")
    p.add_argument("--root", help="folder of the images, for data sets that are not embedded")
    p.add_argument("--device")
    p.add_argument("--out", type=Path, default=REPO / "out" / "leaderboard")
    p.add_argument("--json", action="store_true", help="end with one JSON object on a line")
    p.add_argument("--write", action="store_true", help=f"store it as data/{STORED.name}")
    add_cluster_options(p)
    p.add_argument("--progress", action="store_true", help="bars while encoding")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    args = parser().parse_args(argv)
    args.variants = list(VARIANTS) if args.variants == ["all"] else args.variants
    began = time.perf_counter()
    try:
        if args.seeds < 1 or args.n < 0 or args.orders < 1:
            raise ValueError("seeds and orders must be at least 1, n 0 (all) or more.")
        if args.cluster:
            spread(args, lambda text: print(text, file=sys.stderr, flush=True))
        found = collect(args, lambda text: print(text, file=sys.stderr, flush=True))
    except (ValueError, OSError) as error:
        print(f"python ci/leaderboard.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    table = {"about": found["about"] | {"machine": platform.machine(),
                                        "versions": core.versions()},
             **summarise(found["raw"])}  # fmt: skip
    print(text_table(table))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if args.write:
        write_json(STORED, table)
        print(f"-> {STORED.relative_to(REPO)}", file=sys.stderr)
    if args.json:
        print(json.dumps(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
