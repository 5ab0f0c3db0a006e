"""What a large run will cost, before it is started: ``python -m tpt_nb plan``.

Passes of the image encoder and bytes of the cache are counted; they follow from images, views and
the width of the features. Hours come from seconds per image, of stage 1 and of each method, and a
simulation of the queue that :mod:`tpt_nb.cluster` works off: shards that take differently long,
workers that have to load the model, tasks that fail and are done again. The seconds are those of
``ci/bench/tpt.py`` (``data/costs.json`` has what was measured, ``--costs`` names a file of your
machine). What nobody measured is derived from counted operations at an assumed rate, and the plan
says which.

``simulate`` is checked against real runs by ``ci/bench/cluster.py``.
"""

import heapq
import json
import math
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tpt_nb.core.messages import unknown
from tpt_nb.core.paths import DATA, cache_dir
from tpt_nb.runs import ONE_VIEW
from tpt_nb.scale.cluster import part_size

COSTS = DATA / "costs.json"


# NVIDIA's data sheet of the A100 gives 19.5 TFLOP/s in float32; of such peaks ResNets and CLIP's
# text tower see a part. Nobody measured it here: --images-per-second overrides it.
GPU_FLOPS = 0.4 * 19.5e12


ASSUMED_GPU = "40 % of the 19.5 TFLOP/s (float32) in the data sheet of an A100; not measured here"


LOADERS = 8  # processes that make views beside a GPU, as in encode


START = 30.0  # seconds until a worker has imported torch and loaded model and data set


@dataclass
class Outcome:
    """``seconds`` until the last task ended; ``attempts`` of all tasks; ``lost`` seconds of work in
    attempts that failed; ``busy``, the part of the workers' time in which they worked; ``order`` of
    the tasks as they were finished."""

    seconds: float
    attempts: int
    lost: float
    busy: float
    order: list[int] = field(repr=False)


def simulate(
    tasks: Sequence[float],
    workers: int,
    start: float = 0.0,
    failures: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """Work off a queue of tasks as a cluster does.

    Args:
        tasks: seconds of each, in the order in which they are handed out.
        workers: how many there are. Each takes the next task when it is free.
        start: seconds until a worker can begin, also after it died.
        failures: probability that an attempt fails (its worker dies), at any point of the task. The
            task goes to the end of the queue.
        seed: of the failures.

    Raises:
        ValueError: no worker, a task that takes less than no time, failures not in [0, 1).
    """
    if workers < 1:
        raise ValueError(f"{workers} workers; there must be 1 or more.")
    if not 0 <= failures < 1:
        raise ValueError(f"failures is {failures}; it must be a probability in [0, 1).")
    if len(tasks) and min(tasks) < 0:
        raise ValueError(f"a task takes {min(tasks)} seconds.")
    draw = np.random.default_rng(seed)
    queue, order, idle = deque(range(len(tasks))), [], []
    # what happens next: (when, worker, task that ends or None, does it succeed)
    events: list[tuple[float, int, int | None, bool]] = [
        (start, worker, None, True) for worker in range(workers)
    ]
    attempts, lost, worked, last = 0, 0.0, 0.0, 0.0
    while events:
        now, worker, task, succeeds = heapq.heappop(events)
        if task is not None and succeeds:
            order.append(task)
            last = now
        elif task is not None:
            queue.append(task)
            heapq.heappush(events, (now + start, worker, None, True))
            worker = idle.pop() if idle else None
        if worker is None:
            continue
        if not queue:
            idle.append(worker)
            continue
        task, attempts = queue.popleft(), attempts + 1
        fails = failures > 0 and draw.random() < failures
        seconds = tasks[task] * (draw.random() if fails else 1.0)
        worked += seconds
        lost += seconds * fails
        heapq.heappush(events, (now + seconds, worker, task, not fails))
    return Outcome(last, attempts, lost, worked / (workers * last) if last else 1.0, order)


def durations(n: int, size: int, each: float, spread: float = 0.0, seed: int = 0) -> list[float]:
    """Seconds of the shards of ``n`` images, ``size`` in each: stragglers are lognormal.

    ``spread`` is the standard deviation of the logarithm; the mean stays that of ``each`` image.
    """
    sizes = [min(size, n - k) for k in range(0, n, size)]
    factors = np.random.default_rng(seed).lognormal(-(spread**2) / 2, spread, len(sizes))
    return [float(each * images * factor) for images, factor in zip(sizes, factors, strict=True)]


@dataclass
class Costs:
    """Seconds per image on one worker: stage 1, each method; and where the figures come from."""

    encode: float
    methods: dict[str, float]
    sources: list[str]


def shape(model: str) -> tuple[int, int]:
    """Width of the features and side of the image of a model. ``ValueError`` for unknown names."""
    from tpt_nb.models import OPENAI_MODELS

    if model == "mini":
        return 256, 64
    import open_clip

    name = model.split("@")[0].replace("/", "-")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(unknown("model", model, ["mini", *OPENAI_MODELS]))
    return int(config["embed_dim"]), int(config["vision_cfg"].get("image_size", 224))


def sizes(dataset: str) -> tuple[int, int]:
    """Images and classes of a data set, which need not be here."""
    from tpt_nb import datasets
    from tpt_nb.datasets import iconshift

    if dataset in datasets.BENCHMARKS and datasets.BENCHMARKS[dataset].size:
        return datasets.BENCHMARKS[dataset].size, datasets.BENCHMARKS[dataset].classes
    if dataset in datasets.ICONSHIFT:
        return len(datasets.load(dataset)), len(iconshift.classnames())
    if dataset not in datasets.known():
        raise ValueError(unknown("data set", dataset, datasets.known()))
    raise ValueError(f"the size of {dataset} is not known: give --images and --classes.")


def shard_bytes(n: int, views: int, width: int, id_length: int = 24) -> int:
    """Bytes of the features of ``n`` images in the cache (``encode.pack_shard``)."""
    return n * (views * width * 4 + 8 + 8 + id_length + 6)


def costs(
    model: str,
    classes: int,
    views: int,
    methods: Sequence[str],
    device: str,
    measured: Sequence[dict],
    images_per_second: float | None = None,
) -> Costs:
    """Seconds per image on one GPU ("cuda") or in one process ("cpu").

    ``measured`` are results of ``ci/bench/tpt.py --json``. Those of the same model and kind of
    device count as they are, scaled to the views and classes asked for. On a GPU that nobody
    measured, operations are divided by an assumed rate, and making the views by 8 processes.

    Raises ``ValueError`` if there is nothing to go by.
    """
    from tpt_nb import methods as adapt

    for name in methods:
        if name not in adapt.METHODS:
            raise ValueError(unknown("method", name, adapt.METHODS))
    same = [m for m in measured if m["model"] == model]
    here = [m for m in same if m["device"].startswith("cpu") == (device == "cpu")]
    base = (here or same or [None])[-1]
    if base is None:
        raise ValueError(
            f"nobody measured {model}: run `python ci/bench/tpt.py --model {model} --json > FILE` "
            "and give the file with --costs."
        )
    share, more_classes = views / base["views"], classes / base["classes"]
    where = f"{base['device']}, {base['views']} views, {base['classes']} classes"
    make = base["views_s"] * share
    if here:
        encode = (base["floor_s"] + base["views_s"]) * share if device == "cpu" else max(
            base["floor_s"] * share, make / LOADERS)  # fmt: skip
        tune = base["fast_s"] * more_classes
        sources = [f"stage 1 and tuning: measured with {model} on {where}"]
    else:
        encode = max(base["tflop"]["floor"] * share * 1e12 / GPU_FLOPS, make / LOADERS)
        tune = base["tflop"]["fast"] * more_classes * 1e12 / GPU_FLOPS
        sources = [f"stage 1 and tuning on a GPU: assumed, counted operations at {ASSUMED_GPU}"]
    if images_per_second:
        encode = 1 / images_per_second
        sources[0] = f"stage 1: {images_per_second:g} images/s per worker, as given; " + sources[0]
    each = {}
    for name in methods:
        if _tunes(adapt.METHODS[name]):
            each[name] = tune
        elif name in (light := _light()):
            each[name] = light[name] * classes / 200 * views / 64
        else:
            each[name] = max(_light().values()) * classes / 200 * views / 64
            sources.append(f"{name}: not measured, taken as the slowest that does not tune")
    if any(not _tunes(adapt.METHODS[name]) for name in methods):
        sources.append("methods that do not tune: data/leaderboard.json (CPU, 200 classes), scaled")
    return Costs(encode, each, sources)


def _tunes(method) -> bool:
    import inspect

    return "lr" in inspect.signature(method).parameters


def _light() -> dict[str, float]:
    """Seconds per image of the methods in the leaderboard, 200 classes, 64 views, on a CPU."""
    table = json.loads((DATA / "leaderboard.json").read_text())
    return {r["row"]: r["seconds"] for r in table["rows"]}


def read_costs(path: str | Path = "") -> list[dict]:
    """Results of ``ci/bench/tpt.py --json``: a list of them, or one. ``ValueError`` otherwise."""
    path = Path(path or COSTS)
    try:
        found = json.loads(path.read_text())
        found = found.get("measured", [found])
        for entry in found:
            for key in ("model", "device", "classes", "views", "floor_s", "views_s", "fast_s"):
                entry[key]
            entry["tflop"]["floor"], entry["tflop"]["fast"]
    except OSError as error:
        raise ValueError(f"no measured costs: {path} ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of `ci/bench/tpt.py --json` ({type(error).__name__}: {error})."
        ) from error
    return found


def plan(
    dataset: str = "imagenet",
    model: str = "RN50",
    views: int = 64,
    methods: Sequence[str] = ("tpt",),
    workers: Sequence[int] = (1, 8, 64),
    seeds: int = 1,
    images: int | None = None,
    classes: int | None = None,
    device: str = "cuda",
    price: float = 2.0,
    images_per_second: float | None = None,
    spread: float = 0.2,
    failures: float = 0.01,
    cache: str = "",
    measured: Sequence[dict] | None = None,
) -> dict:
    """What runs of some methods on a data set take; see ``python -m tpt_nb plan --help``.

    Returns a dict: counts, ``rows`` (one per number of workers), ``sources``, ``warnings``.
    """
    known = (images, classes) if images and classes else sizes(dataset)
    n, c = images or known[0], classes or known[1]
    for name, value in {"views": views, "seeds": seeds, "images": n, "classes": c}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more.")
    if images_per_second is not None and images_per_second <= 0:
        raise ValueError(f"images-per-second is {images_per_second}; it must be positive.")
    width, side = shape(model)
    measured = read_costs() if measured is None else measured
    # a method that looks at the image only has features of its own, of one view
    sets = sorted({1 if name in ONE_VIEW else views for name in methods}, reverse=True)
    cost = {v: costs(model, c, v, methods, device, measured, images_per_second) for v in sets}
    rows = []
    for count in workers:
        encode_s = attempts = 0
        for v in sets:
            each = cost[v].encode * (v / views if images_per_second else 1)
            size = part_size(n, count)
            for seed in range(seeds):
                tasks = durations(n, size, each, spread, seed)
                outcome = simulate(tasks, count, START, failures, seed)
                encode_s += outcome.seconds
                attempts += outcome.attempts - len(tasks)
        adapting = [n * cost[1 if m in ONE_VIEW else views].methods[m] for m in methods] * seeds
        adapt_s = simulate(sorted(adapting, reverse=True), count, START).seconds
        hours = (encode_s + adapt_s) / 3600
        rows.append({
            "workers": count,
            "encode_hours": encode_s / 3600,
            "adapt_hours": adapt_s / 3600,
            "hours": hours,
            "worker_hours": hours * count,
            "cost": hours * count * price if device != "cpu" else None,
            "done_again": attempts,
        })  # fmt: skip
    need = seeds * sum(shard_bytes(n, v, width) for v in sets)
    place = Path(cache or cache_dir()).absolute() if "://" not in cache else None
    free = shutil.disk_usage(_existing(place)).free if place else None
    warnings = []
    if free is not None and need > free:
        warnings.append(
            f"the features take {_gb(need)} and {place} has {_gb(free)} free: give another --cache "
            "(a larger disk, s3://...), fewer views, or one seed after the other"
        )
    most = max(rows, key=lambda row: row["workers"])
    if len(methods) * seeds < most["workers"] and most["adapt_hours"] > most["encode_hours"]:
        warnings.append(
            "stage 2 is one task per method and seed: beyond so many, workers do not shorten it"
        )
    return {
        "dataset": dataset, "model": model, "images": n, "classes": c, "views": views,
        "methods": list(methods), "seeds": seeds, "device": device, "image_size": side,
        "passes": seeds * n * sum(sets), "bytes": need, "free_bytes": free,
        "seconds_per_image": {"encode": cost[sets[0]].encode, **cost[sets[0]].methods},
        "price": price if device != "cpu" else None, "spread": spread, "failures": failures,
        "rows": rows, "sources": list(dict.fromkeys(s for v in sets for s in cost[v].sources)),
        "warnings": warnings,
    }  # fmt: skip


def text(p: dict) -> str:
    """The plan for people."""
    unit = "GPUs" if p["device"] != "cpu" else "processes"
    lines = [
        f"{p['dataset']}, {p['model']}, {p['images']:,} images, {p['classes']:,} classes, "
        f"{p['views']} views, {p['seeds']} seed(s), methods: {', '.join(p['methods'])}",
        f"  passes of the image encoder  {p['passes']:,}",
        f"  bytes of cached features     {_gb(p['bytes'])}"
        + (f" ({_gb(p['free_bytes'])} free)" if p["free_bytes"] is not None else ""),
        "",
        f"  {unit:>9}  {'stage 1':>9}  {'stage 2':>9}  {'hours':>9}  {'worker-h':>9}  {'cost':>9}",
    ]
    for r in p["rows"]:
        cost = "" if r["cost"] is None else f"{r['cost']:,.2f}"
        lines.append(
            f"  {r['workers']:>9}  {r['encode_hours']:>9.2f}  {r['adapt_hours']:>9.2f}  "
            f"{r['hours']:>9.2f}  {r['worker_hours']:>9.2f}  {cost:>9}"
        )
    lines.append("")
    if p["price"] is not None:
        lines.append(
            f"  cost: at {p['price']:g} per GPU and hour (--price; no offer, set your own)"
        )
    lines.append(
        f"  shards differ by {100 * p['spread']:.0f} %, {100 * p['failures']:g} % of the tasks "
        f"fail, a worker starts in {START:.0f} s: assumed (--spread, --failures)"
    )
    lines += [f"  {source}" for source in p["sources"]]
    lines += [f"warning: {warning}" for warning in p["warnings"]]
    return "\n".join(lines)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _gb(n: float) -> str:
    digits = max(0, 2 - int(math.log10(max(1.0, n / 1e9))))
    return f"{n / 1e9:,.{digits}f} GB" if n >= 1e7 else f"{n / 1e6:,.2f} MB"
