"""The order of the images: ``python -m tpt_nb streams``.

What an online method learns hangs on what it met first. A *cell* is a row (a method with its
options) on a data set under a kind of stream: the accuracy in each of a hundred orders of that
kind. A kind is judged by the mean over the orders and by the *tail*, the mean of the worst tenth
(the Expected Tail Accuracy of Fuchs et al., OGA, 2025), and a method by what it loses from shuffled
to sorted streams. Episodic methods, and transductive ones that get all images at once, know no
order: their line does not move, and is computed once.

Transductive methods stand here a second time, with batches: of consecutive images of a stream, or
of images of few classes. Finished cells are in ``out`` and are not done again.
"""

import dataclasses
import functools
import json
import multiprocessing
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tpt_nb import features
from tpt_nb import methods as registry
from tpt_nb.core.command_line import setting
from tpt_nb.core.files import write_json, write_whole
from tpt_nb.core.machine import device_name, versions
from tpt_nb.core.messages import say_once
from tpt_nb.core.paths import DATA, REPO
from tpt_nb.runs import orders as draw
from tpt_nb.runs.config import GROUP, RunConfig, augmenter_of, identity, options_of, short_hash
from tpt_nb.runs.engine import Session
from tpt_nb.runs.profile import data_of, resolve
from tpt_nb.runs.sweep import read_yaml

STORED = DATA / "streams.json"
KEYS = ("rows", "common", "variants", "domains", "batch", "fewer_orders")
VERSION = 1  # of the cells; raise it when the same cell gives other numbers
ORDERS = {
    "shuffled": draw.shuffled,
    "dirichlet 0.1": functools.partial(draw.dirichlet, gamma=0.1),
    "dirichlet 0.01": functools.partial(draw.dirichlet, gamma=0.01),
    "dirichlet 0.001": functools.partial(draw.dirichlet, gamma=0.001),
    "sorted": draw.class_by_class,
}
FEW = {"1-4 classes": (1, 4), "2-10 classes": (2, 10)}
DOMAINS, ANY = "domains", "any"  # one after another; where the order is of no account
BYTES = 2**28  # of the logits, or of the features, that one call may have


@dataclass(frozen=True)
class StreamsOptions:
    """Options of ``streams`` beside those of ``evaluate``, which override the grid's."""

    variants: list[str] = setting((), "data sets; default: those of the grid")
    domains: list[str] = setting((), "that come one after another; default: those of the grid")
    n: int | None = setting(None, "images of each data set, as --reduced_size; 0: all")
    methods: list[str] = setting((), "only these; default: every one and the grid's rows")
    orders: int = setting(100, "of each kind of stream")
    jobs: int = setting(1, "rows at a time; more than one makes the seconds longer")
    grid: str = setting(str(REPO / "notebooks" / "sweeps" / "streams.yaml"), "YAML file")
    json: bool = setting(False, "end with one JSON object on a line")
    write: bool = setting(False, "store it as data/streams.json")


@dataclass(frozen=True)
class Row:
    """A line of the table, on one data set or on several, one after another."""

    label: str
    configs: tuple[RunConfig, ...]
    kinds: tuple[str, ...]
    orders: int


def streams(options: StreamsOptions, overrides: Mapping | None = None) -> int:
    """Do the cells that are missing and print the table; returns the exit code.

    Raises ``ValueError`` for a wrong option, and for methods that need more than features.
    """
    if min(options.orders, options.jobs) < 1:
        raise ValueError("orders and jobs must be at least 1.")
    given = {} if options.n is None else {"reduced_size": options.n}
    grid = read_yaml(Path(options.grid), KEYS)
    for key in ("variants", "domains"):
        grid[key] = list(getattr(options, key)) or grid.get(key, [])
    grid["common"] = grid.get("common", {}) | dict(overrides or {}) | given
    out = Path(grid["common"].pop("out", "") or "runs/streams")
    rows = rows_of(grid, options.methods, options.orders)
    cells: dict[str, dict] = {}
    for number, (row, found) in enumerate(_done(rows, out, options.jobs), start=1):
        name = row.configs[0].dataset if len(row.configs) == 1 else DOMAINS
        cells.setdefault(row.label, {})[name] = found
        seconds = sum(cell["seconds"] for cell in found.values())
        print(f"[{number}/{len(rows)}] {name}, {row.label}: {seconds:.0f} s", flush=True)
    table = {"about": _about(rows, grid, options), **summarise(rows, cells)}
    print(text_table(table))
    if options.write:
        write_whole(STORED, json.dumps(table, indent=1) + "\n")
        print(f"-> {STORED}")
    if options.json:
        print(json.dumps(table))
    return 0


def _about(rows: Sequence[Row], grid: Mapping, options: StreamsOptions) -> dict:
    config = max((c for row in rows for c in row.configs), key=lambda c: c.n_aug)
    about = {name: grid.get(name) for name in ("variants", "domains", "batch")}
    about |= {"n": config.reduced_size, "orders": options.orders, "n_aug": config.n_aug}
    about |= {"model": config.model, "seed": config.seed, "device": device_name(config.device)}
    return about | {"machine": platform.machine(), "versions": versions()}


def rows_of(grid: Mapping, only: Sequence[str], orders: int) -> list[Row]:
    """The grid's rows, then every method that knows a stream and needs features alone."""
    for name in only:
        if needs := registry.get(name).needs:
            raise ValueError(f"{name} needs {needs}; streams are of features alone.")
    found = [(row.get("label", row["method"]), row) for row in grid["rows"]]
    for name in registry.names():
        method = registry.get(name)
        if method.kind != "episodic" and not method.needs:
            found.append((name, {"method": name}))
            takes = {field.name for field in dataclasses.fields(method.options)}
            if method.kind == "transductive" and "batch" in takes and (batch := grid.get("batch")):
                found.append((f"{name}, {batch} at a time", {"method": name, "batch": batch}))
    sources = [(variant,) for variant in grid["variants"]]
    sources += [tuple(grid["domains"])] if len(grid["domains"]) > 1 else []
    rows = []
    for label, values in found:
        values = {key: value for key, value in values.items() if key != "label"}
        for names in sources if not only or values["method"] in only else ():
            made = RunConfig.from_dict(grid["common"] | values)
            configs = tuple(resolve(made.replace(dataset=name))[0] for name in names)
            few = (grid.get("fewer_orders") or {}).get(made.method, orders)
            rows.append(Row(label, configs, _kinds(configs), min(orders, few)))
    return rows


def _kinds(configs: Sequence[RunConfig]) -> tuple[str, ...]:
    """The kinds of stream that make a difference to a row."""
    method = registry.get(configs[0].method)
    batch = configs[0].options.get("batch")
    if method.kind == "episodic" or (method.kind == "transductive" and not batch):
        return (ANY,)
    if len(configs) > 1:
        return (DOMAINS,)
    return (*ORDERS, *(FEW if method.kind == "transductive" else ()))


# --- cells ---------------------------------------------------------------------------------------


def _done(rows: Sequence[Row], out: Path, jobs: int) -> Iterator[tuple[Row, dict]]:
    """Each row with its cells, in their order."""
    if jobs == 1:
        yield from ((row, do_row(row, out)) for row in rows)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        yield from zip(rows, pool.map(do_row, rows, [out] * len(rows)), strict=True)


def do_row(row: Row, out: Path) -> dict[str, dict]:
    """Kind -> its cell: loaded from ``out``, or computed and left there."""
    out.mkdir(parents=True, exist_ok=True)
    whole = [data_of(config)[0] for config in row.configs]
    same = [identity(config) for config in row.configs] + [data.fingerprint for data in whole]
    found, opened = {}, None
    for kind in row.kinds:
        number = 1 if kind == ANY else row.orders
        path = out / f"{short_hash({'of': same, 'kind': kind, 'n': number, 'v': VERSION})}.json"
        if not path.is_file():
            opened = opened or open_row(row.configs, whole)
            began = time.perf_counter()
            right = right_in(kind, opened, number)
            accuracy = right.double().mean(1)
            parts = right.double().split(opened.sizes, dim=1)
            cell = {"row": row.label, "kind": kind, "n": right.shape[1]}
            cell |= {"accuracy": [round(float(x), 6) for x in accuracy]}
            cell["parts"] = {config.dataset: round(float(part.mean()), 6)
                             for config, part in zip(row.configs, parts, strict=True)}  # fmt: skip
            write_json(path, cell | {"seconds": round(time.perf_counter() - began, 3)})
        found[kind] = json.loads(path.read_text())
    return found


@dataclass
class Opened:
    """What a row is computed from: the images of one data set, or of several behind each other."""

    config: RunConfig
    prompts: object
    views: Tensor  # [B,V,D]
    targets: Tensor  # [B]
    sizes: list[int]


_session = functools.cache(Session)  # a process keeps the model and the prompts of its last row


def open_row(configs: Sequence[RunConfig], whole: Sequence) -> Opened:
    """Encode (cached) and put behind each other; ``ValueError`` if their classes differ."""
    config, names = configs[0], list(whole[0].classnames)
    if any(list(data.classnames) != names for data in whole):
        raise ValueError(f"{', '.join(c.dataset for c in configs)} do not have the same classes.")
    clip, parts = _session().model(config), []
    for c, data in zip(configs, whole, strict=True):
        made, cache = augmenter_of(c, clip.image_size), Path(c.cache)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*images failed")  # said below
            done = features.encode(data, clip, made, c.seed, cache, c.workers, progress=False)
        if done.failed:
            say_once(f"{len(done.failed)} images of {c.dataset} cannot be read and are left out")
        parts.append(done)
    views = torch.cat([part.features for part in parts]).to(clip.device)
    targets = torch.cat([part.targets for part in parts])
    prompts = _session().prompts(config, names)
    return Opened(config, prompts, views, targets, [len(part) for part in parts])


def right_in(kind: str, opened: Opened, number: int) -> Tensor:
    """bool ``[O,B]``: in each of so many orders of a kind, which images are right."""
    config, targets = opened.config, opened.targets
    method, options = registry.get(config.method), options_of(config)
    adapt = functools.partial(method.adapt, prompts=opened.prompts, options=options)
    if kind == ANY:
        size = GROUP if method.kind == "episodic" else len(targets)
        parts = [adapt(views).logits for views in opened.views.split(size)]
        return torch.cat(parts).argmax(-1).cpu()[None] == targets
    if kind in FEW:
        return _in_batches(opened, draw.few_classes(targets, number, config.seed, *FEW[kind]))
    if kind == DOMAINS:
        rows = draw.one_after_another(opened.sizes, number, config.seed)
    else:
        rows = ORDERS[kind](targets, number, config.seed)
    each = 4 * len(targets) * (int(targets.max()) + 1)
    right = [
        adapt(opened.views, orders=part).logits.argmax(-1).cpu() == targets
        for part in rows.split(max(1, BYTES // each))
    ]
    return torch.cat(right)


def _in_batches(opened: Opened, orders: Sequence[Sequence[Tensor]]) -> Tensor:
    """bool ``[O,B]`` of a transductive method that gets these batches, each on its own.

    Batches of the same size, of all orders, are one stream whose batches have that size.
    """
    config, targets = opened.config, opened.targets
    method, options = registry.get(config.method), options_of(config)
    right = torch.zeros(len(orders), len(targets), dtype=torch.bool)
    places: dict[int, list] = {}
    for o, batches in enumerate(orders):
        for batch in batches:
            places.setdefault(len(batch), []).append((o, batch))
    for size, found in places.items():
        stream = torch.tensor([o for o, batch in found for _ in batch])
        images = torch.cat([batch for _, batch in found])
        options = dataclasses.replace(options, batch=size)
        batches = max(1, BYTES // (4 * opened.views[0].numel() * size))
        for o, i in zip(stream.split(batches * size), images.split(batches * size), strict=True):
            order = torch.arange(len(i))
            logits = method.adapt(opened.views[i], opened.prompts, options, orders=order).logits
            right[o, i] = logits.argmax(-1).cpu() == targets[i]
    return right


# --- the table -----------------------------------------------------------------------------------


def tail(accuracy: Sequence[float]) -> float:
    """Mean of the worst tenth, of the worst one at least."""
    return float(np.mean(np.sort(accuracy)[: max(1, len(accuracy) // 10)]))


def summarise(rows: Sequence[Row], cells: Mapping[str, Mapping[str, Mapping]]) -> dict:
    """Under rows, label -> kind -> numbers, means over the data sets; labels: what each row is.

    Args:
        cells: label -> data set, or "domains" -> kind -> cell.
    """
    numbers, labels = {}, {}
    for label, row in {row.label: row for row in rows}.items():
        method, still = registry.get(row.configs[0].method), row.kinds == (ANY,)
        single = {name: found for name, found in cells[label].items() if name != DOMAINS}
        named = [*ORDERS, *(FEW if method.kind == "episodic" or not still else ())]
        kinds = {k: {v: f.get(ANY if still else k) for v, f in single.items()} for k in named}
        for cell in cells[label].get(DOMAINS, {}).values():
            kinds[DOMAINS] = {DOMAINS: cell}
        numbers[label] = {k: _numbers(v) for k, v in kinds.items() if v and all(v.values())}
        about = {"method": row.configs[0].method, "kind": method.kind, "moves": not still}
        about["options"] = row.configs[0].options
        if single:
            mean = {k: numbers[label][k]["mean"] for k in ("shuffled", "sorted")}
            about["loss"] = mean["shuffled"] - mean["sorted"]
        took = [cell["seconds"] for found in single.values() for cell in found.values()]
        labels[label] = about | {"seconds": max(took, default=None)}  # of the longest cell
    return {"rows": numbers, "labels": labels}


def _numbers(cells: Mapping[str, Mapping]) -> dict:
    """Mean and tail, averaged over data sets, and of each its own."""
    each = {}
    for name, cell in cells.items():
        x = cell["accuracy"]
        each[name] = {"mean": float(np.mean(x)), "tail": tail(x), "worst": min(x), "best": max(x)}
        each[name] |= {"std": float(np.std(x)), "orders": len(x)}
        if len(cell["parts"]) > 1:
            each[name]["parts"] = cell["parts"]
    out = {key: float(np.mean([x[key] for x in each.values()])) for key in ("mean", "tail")}
    return out | {"sets": each}


def text_table(table: Mapping) -> str:
    """For people, in per cent: the mean over the orders, and the tail where there is one."""
    lines = []
    for label, found in table["rows"].items():
        about = table["labels"][label]
        line = {"row": label, "kind": about["kind"]}
        for kind, x in found.items():
            line[kind] = f"{100 * x['mean']:.1f}"
            line[kind] += f" ({100 * x['tail']:.1f})" if about["moves"] else ""
        if "loss" in about:
            line["loss"] = f"{100 * about['loss']:+.1f}"
        lines.append(line | {"s": f"{about['seconds']:.0f}" if about["seconds"] else ""})
    notes = "mean over the orders (mean of the worst tenth); loss: from shuffled to sorted"
    return pd.DataFrame(lines).fillna("").to_string(index=False) + f"\n{notes}"
