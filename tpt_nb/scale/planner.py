"""What a large run will take, before it is started: ``python -m tpt_nb plan``.

Passes of the image encoder and bytes, on disk and in memory, are counted; hours are arithmetic on
seconds per image (:func:`hours`), nothing is simulated. The seconds are those of
``ci/bench/tpt.py``:
``data/costs.json`` has what was measured, ``--costs`` names a file of your machine. What nobody
measured is derived from counted operations at an assumed rate, and the plan says which.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tpt_nb import datasets
from tpt_nb.core.files import read_json
from tpt_nb.core.messages import unknown
from tpt_nb.core.paths import DATA, cache_dir
from tpt_nb.methods import get
from tpt_nb.models import OPENAI_MODELS
from tpt_nb.runs import memory_of
from tpt_nb.scale.cluster import part_size

GPU_FLOPS = 0.4 * 19.5e12  # of such peaks ResNets see a part; --images-per-second overrides it
ASSUMED_GPU = "40 % of the 19.5 TFLOP/s (float32) in the data sheet of an A100; not measured here"
LOADERS = 8  # processes that make views beside a GPU, as in features.encode
START = 30.0  # seconds until a worker has imported torch and loaded model and data set
LIGHT = 1e-3  # seconds per image, 200 classes, 64 views: more no method without a context takes
STEP = 3  # a step on the image encoder costs as so many passes: forward, and twice that backward


def hours(work: float, longest: float, workers: int) -> float:
    """Hours until tasks of ``work`` seconds in all, the longest of so many, are done.

    Start-up, an equal share of the work, and of the last task what nobody shares. Workers that take
    the next task when they are free never need more (Graham, 1966), if nothing fails.
    """
    return (START + work / workers + longest * (1 - 1 / workers)) / 3600


def width(model: str) -> int:
    """Of the features of a model. ``ValueError`` for unknown names."""
    if model == "mini":
        return 256
    import open_clip

    config = open_clip.get_model_config(model.split("@")[0].replace("/", "-"))
    if config is None:
        raise ValueError(unknown("model", model, ["mini", *OPENAI_MODELS]))
    return int(config["embed_dim"])


def sizes(dataset: str) -> tuple[int, int]:
    """Images and classes of a data set, which need not be here."""
    datasets.get(dataset)  # raises if there is none of this name
    dataset = dataset.split("/")[0]  # a damaged one has as many
    field = datasets.BENCHMARKS.get(dataset)
    if field and field.size:
        return field.size, field.classes
    if dataset in datasets.ICONSHIFT:
        embedded = datasets.load(dataset)
        return len(embedded), len(embedded.classnames)
    raise ValueError(f"the size of {dataset} is not known: give --images and --classes.")


def read_costs(path: str | Path = "") -> list[dict]:
    """Results of ``ci/bench/tpt.py --json``: a list of them, or one. ``ValueError`` otherwise."""
    path = Path(path or DATA / "costs.json")
    try:
        found = read_json(path)
    except OSError as error:
        raise ValueError(f"no measured costs: {path} ({error.strerror}).") from error
    try:
        found = found.get("measured", [found])
        for entry in found:
            keys = ("classes", "views", "floor_s", "views_s", "fast_s")
            numbers = {key: float(entry[key]) for key in keys}
            numbers |= {key: float(entry["tflop"][key]) for key in ("floor", "fast")}
            for key, value in numbers.items():
                if not 0 <= value < float("inf") or (key in ("classes", "views") and value < 1):
                    raise ValueError(f"{key} is {value:g}")
            if not isinstance(entry["model"], str) or not isinstance(entry["device"], str):
                raise TypeError("model and device are names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of `ci/bench/tpt.py --json` ({type(error).__name__}: {error})."
        ) from error
    return found


def costs(
    model: str, classes: int, views: int, methods: Sequence[str], device: str,
    measured: Sequence[dict], images_per_second: float | None = None,
) -> tuple[float, dict[str, float], list[str]]:  # fmt: skip
    """Seconds per image on one worker, of stage 1 and of each method, and where they come from.

    ``measured`` are results of ``ci/bench/tpt.py``, scaled to these views and classes. On a GPU
    that nobody measured, operations are divided by an assumed rate.
    """
    same = [m for m in measured if m["model"] == model]
    here = [m for m in same if m["device"].startswith("cpu") == (device == "cpu")]
    if not same:
        raise ValueError(
            f"nobody measured {model}: run `python ci/bench/tpt.py --model {model} --json > FILE` "
            "and give the file with --costs."
        )
    base = (here or same)[-1]
    if here:
        floor, tune = base["floor_s"], base["fast_s"]
        where = f"{base['device']}, {base['views']} views, {base['classes']} classes"
        sources = [f"stage 1 and tuning: measured with {model} on {where}"]
    else:
        floor, tune = (base["tflop"][key] * 1e12 / GPU_FLOPS for key in ("floor", "fast"))
        sources = [f"stage 1 and tuning on a GPU: assumed, counted operations at {ASSUMED_GPU}"]
    floor, make = (seconds * views / base["views"] for seconds in (floor, base["views_s"]))
    if images_per_second:
        encode = floor = 1 / images_per_second
        sources[0] = f"stage 1: {images_per_second:g} images/s per worker, as given; " + sources[0]
    else:
        encode = floor + make if device == "cpu" else max(floor, make / LOADERS)
    each = {}
    for name in methods:
        method = get(name)
        if method.tunes in ("context", "encoder"):
            each[name] = tune * classes / base["classes"]
        else:
            each[name] = LIGHT * classes / 200 * views / 64
            sources.append(
                "methods that tune no context: at most 1 ms per image, 200 classes and 64 views, "
                "on a CPU: as in data/leaderboard.json"
            )
        if method.tunes == "encoder":  # the views again, a step on the confident, view 0 once more
            share = getattr(method.options(), "rho", 1.0)  # without selection: all views
            passes = STEP * max(1, int(views * share)) + 1
            each[name] += make + floor * passes / views
            sources.append(f"{name}: tuning, and {passes} passes of the image encoder, counted")
        elif method.needs:
            sources.append(f"{name}: without what it takes to make {method.needs}")
    return encode, each, sources


def plan(
    dataset: str = "imagenet", model: str = "RN50", views: int = 64,
    methods: Sequence[str] = ("tpt",), workers: Sequence[int] = (1, 8, 64), seeds: int = 1,
    images: int | None = None, classes: int | None = None, device: str = "cuda", price: float = 2.0,
    images_per_second: float | None = None, failures: float = 0.0, cache: str = "",
    measured: Sequence[dict] | None = None,
) -> dict:  # fmt: skip
    """What runs of some methods on a data set take; see ``python -m tpt_nb plan --help``.

    Returns a dict: counts, ``rows`` (one per number of workers), ``sources``, ``warnings``.
    """
    n, c = (images, classes) if images and classes else sizes(dataset)
    n, c = images or n, classes or c
    least = {"views": views, "seeds": seeds, "images": n, "classes": c, "workers": min(workers)}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more.")
    if images_per_second is not None and images_per_second <= 0:
        raise ValueError(f"images-per-second is {images_per_second}; it must be positive.")
    if not 0 <= failures < 1:
        raise ValueError(f"failures is {failures}; it must be a share in [0, 1).")
    measured = read_costs() if measured is None else measured
    # a method that looks at the image only has features of its own, of one view
    used = {name: 1 if get(name).views == "first" else views for name in methods}
    encode, adapt, sources = {}, {}, []
    for v in sorted(set(used.values()), reverse=True):
        rate = images_per_second and images_per_second * views / v
        own = [name for name in methods if used[name] == v]
        encode[v], each, found = costs(model, c, v, own, device, measured, rate)
        adapt, sources = adapt | each, sources + found
    rows = [_row(n, seeds, count, encode, adapt, failures, device, price) for count in workers]
    memory = {name: memory_of(get(name), n, used[name], width(model), c) for name in methods}
    need = seeds * n * sum(v * width(model) * 4 + 46 for v in encode)  # 46: id, target, seconds
    place = Path(cache or cache_dir()).absolute()
    there = next(p for p in (place, *place.parents) if p.exists())
    free = None if "://" in cache else shutil.disk_usage(there).free
    warnings = []
    if free is not None and need > free:
        warnings.append(
            f"the features take {need / 1e9:,.1f} GB and {place} has "
            f"{free / 1e9:,.1f} GB free: give another --cache (a larger disk, s3://...), fewer "
            "views, or one seed after the other"
        )
    if len(adapt) * seeds < max(workers) and rows[-1]["adapt_hours"] > rows[-1]["encode_hours"]:
        warnings.append(
            "stage 2 is one task per method and seed: beyond so many, workers do not shorten it"
        )
    return {
        "dataset": dataset, "model": model, "images": n, "classes": c, "views": views,
        "methods": list(methods), "seeds": seeds, "device": device, "price": price,
        "failures": failures, "passes": seeds * n * sum(encode), "bytes": need, "free_bytes": free,
        "memory": memory,
        "seconds_per_image": {"encode": max(encode.values()), **adapt}, "rows": rows,
        "sources": list(dict.fromkeys(sources)), "warnings": warnings,
    }  # fmt: skip


def _row(n: int, seeds: int, count: int, encode: dict, adapt: dict, failures: float, device: str,
         price: float) -> dict:  # fmt: skip
    """Hours and price with so many workers."""
    again, part = 1 + failures / (1 - failures) / 2, part_size(n, count)  # they end half way
    first = hours(seeds * n * sum(encode.values()) * again, part * max(encode.values()), count)
    second = hours(seeds * n * sum(adapt.values()), n * max(adapt.values()), count)
    row = {"workers": count, "encode_hours": first, "adapt_hours": second}
    row |= {"hours": first + second, "worker_hours": count * (first + second)}
    return row | {"cost": None if device == "cpu" else price * row["worker_hours"]}


def plan_text(found: dict) -> str:
    """A plan for people."""
    from pandas import DataFrame

    memory = "; ".join(
        f"{name} {size / 1e9:,.2f} GB"
        + ("" if get(name).kind == "episodic" else " (all images at once)")
        for name, size in found["memory"].items()
    )
    names = ["processes" if found["device"] == "cpu" else "GPUs", "stage 1", "stage 2"]
    table = DataFrame(found["rows"]).dropna(axis=1)
    table.columns = [*names, "hours", "worker-h", "cost"][: len(table.columns)]
    lines = [
        "{dataset}, {model}, {images:,} images, {classes:,} classes, {views} views, {seeds} "
        "seed(s): ".format(**found)
        + ", ".join(found["methods"]),
        f"  passes of the image encoder  {found['passes']:,}",
        f"  bytes of cached features     {found['bytes'] / 1e9:,.2f} GB",
        f"  memory for features, logits  {memory}: beside the model, on each worker\n",
        table.to_string(index=False, col_space=10, float_format="{:,.2f}".format) + "\n",
        f"  hours: arithmetic, no simulation. Work / workers, plus what nobody shares of the last "
        f"task, plus {START:.0f} s to start; {100 * found['failures']:g} % of the tasks done again",
    ]
    if found["device"] != "cpu":
        price = f"{found['price']:g} per GPU and hour"
        lines.append(f"  cost: at {price} (--price; no offer, set your own)")
    lines += [f"  {source}" for source in found["sources"]]
    return "\n".join(lines + [f"warning: {warning}" for warning in found["warnings"]])
