"""Every method on the same views, in one table: ``python -m tpt_nb leaderboard``.

A grid of runs: rows x variants x seeds of the views (x orders of the stream, for methods that have
an order). Rows are the methods that need features alone, under one prompt, and those of the grid
file, which also names the variants and the rows that the others are held against.

Accuracies are means over seeds and orders; intervals come from drawing images again, each with its
mean. Seconds are of adapting from encoded features, on this machine: more than one run at a time
makes them longer. Memory is the peak of what one call allocates: of an episodic method per image,
from a batch of 8; of the others for the whole stream, with all that they keep.

Finished runs are loaded, killed ones go on. A run that fails costs its row and no other: the table
names it under "failed", and the exit code is 1.
"""

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from tpt_nb import datasets, features
from tpt_nb import methods as registry
from tpt_nb.core.command_line import setting
from tpt_nb.core.files import write_json, write_whole
from tpt_nb.core.machine import device_name, versions
from tpt_nb.core.messages import first_line
from tpt_nb.core.paths import DATA, REPO
from tpt_nb.methods import Setting
from tpt_nb.runs.board import Cell, hash_of, images_of, summarise, text_table
from tpt_nb.runs.config import RunConfig, augmenter_of, options_of
from tpt_nb.runs.engine import Session
from tpt_nb.runs.pool import Spread, run_many, start_server
from tpt_nb.runs.profile import data_of, resolve
from tpt_nb.runs.records import Run
from tpt_nb.runs.sweep import read_yaml

STORED = DATA / "leaderboard.json"
KEYS = ("rows", "common", "variants", "decisive", "left_out", "start", "references")


@dataclass(frozen=True)
class LeaderboardOptions:
    """Options of ``leaderboard`` beside those of ``evaluate``, which override the grid's."""

    variants: list[str] = setting((), "data sets; default, and all: those of the grid")
    n: int | None = setting(None, "images of each data set, as --reduced_size; 0: all")
    methods: list[str] = setting((), "only these; default: every one")
    seeds: int = setting(1, "of the views")
    orders: int = setting(1, "of the stream per seed; streams asks for a hundred")
    jobs: int = setting(1, "runs at a time; more than one makes the seconds longer")
    grid: str = setting(str(REPO / "notebooks" / "sweeps" / "leaderboard.yaml"), "YAML file")
    json: bool = setting(False, "end with one JSON object on a line")
    write: bool = setting(False, "store it as data/leaderboard.json")
    check: bool = setting(False, "only say which rows of data/leaderboard.json are out of date")


def leaderboard(
    options: LeaderboardOptions, overrides: Mapping | None = None, spread: Spread | None = None
) -> int:
    """Do the runs that are missing and print the table; returns the exit code.

    Args as of ``sweep``; ``ValueError`` if not one row is there. 1 if a row failed.
    With ``check`` nothing is run: 1 if a stored row is not of the runs that would be done now.
    """
    if options.check:
        return _check(json.loads(STORED.read_text()))
    if min(options.seeds, options.orders, options.jobs) < 1:
        raise ValueError("seeds, orders and jobs must be at least 1.")
    asked: dict = {name: list(getattr(options, name)) for name in ("variants", "methods")}
    asked |= {"seeds": options.seeds, "orders": options.orders}
    given = {} if options.n is None else {"reduced_size": options.n}
    asked["overrides"] = {k: v for k, v in (overrides or {}).items() if k != "out"} | given
    out = Path((overrides or {}).get("out") or "runs/leaderboard")
    grid = read_yaml(Path(options.grid), KEYS)
    cells, data = cells_of(grid, out=str(out), **asked)
    cells, images, runs, failed = _do(cells, options.jobs, spread)
    session, config = Session(), runs[0].config
    about = {"model": config.model, "fingerprint": session.model(config).fingerprint}
    about |= {"n_aug": max(run.config.n_aug for run in runs), "orders": options.orders}
    about |= {"device": device_name(config.device), "machine": platform.machine()}
    asked["overrides"]["device"] = config.device.split(":")[0]
    about |= {"versions": versions(), "asked": asked, "data": data}
    table = {"about": about, **summarise(cells, images, runs, grid), "failed": failed}
    firsts = {cell.label: done for cell, done in zip(reversed(cells), reversed(runs), strict=True)}
    for row in table["rows"]:
        try:
            row["bytes"] = peak_memory(firsts[row["row"]], session)
        except (ValueError, RuntimeError) as error:
            row["bytes"] = None
            print(f"{row['row']}: memory not measured, {first_line(error)}")
    print(text_table(table))
    if options.write:
        write_whole(STORED, json.dumps(table) + "\n")
        print(f"-> {STORED}")
    if options.json:
        print(json.dumps(table))
    return int(bool(failed))


# --- the grid ------------------------------------------------------------------------------------


def cells_of(
    grid: Mapping, variants: Sequence[str], methods: Sequence[str], seeds: int, orders: int,
    overrides: Mapping, out: str = "",
) -> tuple[list[Cell], dict[str, str]]:  # fmt: skip
    """The runs of the table, and the fingerprint of each variant's images."""
    common = grid.get("common", {}) | dict(overrides) | ({"out": out} if out else {})
    chosen = grid["variants"] if list(variants) in ([], ["all"]) else variants
    wholes = {v: datasets.load(v, root=common.get("root") or None) for v in chosen}
    cells = []
    for label, values in _rows(grid, common, chosen[0], methods):
        config = RunConfig.from_dict(common | values)
        ordered = _has_order(config)
        prompt = config.templates or ("coop" if config.coop else "single")
        for variant, whole in wholes.items():
            n = min(config.reduced_size or len(whole), len(whole))
            for seed in range(seeds):
                run = config.replace(dataset=variant, reduced_size=n, seed=seed)
                several = [{"order": seed * orders + k} for k in range(orders)] if ordered else [{}]
                cells += [
                    Cell(label, prompt, variant, seed, run.replace(**order)) for order in several
                ]
    return cells, {variant: whole.fingerprint for variant, whole in wholes.items()}


def _has_order(config: RunConfig) -> bool:
    """Does it matter which image comes first? Not where all are taken at once."""
    method = registry.get(config.method)
    if method.kind == "transductive" and not config.options.get("batch"):
        return False
    return "order" in {f.name for f in dataclasses.fields(method.options)}


def _rows(grid: Mapping, common: dict, variant: str, only: Sequence[str]) -> list[tuple[str, dict]]:
    """Labels and options: every method that needs features alone, then the grid's own rows."""
    for name in only:
        if needs := registry.get(name).needs:
            raise ValueError(f"{name} needs {needs}; the leaderboard gives features alone.")
    coop, common = common.pop("coop", ""), dict(common)
    model = resolve(RunConfig.from_dict(common | {"dataset": variant}))[0].model
    rows = [(name, {"method": name}) for name in registry.names() if not registry.get(name).needs]
    for entry in grid["rows"]:
        values = {k: v for k, v in entry.items() if k not in ("label", "not_for")}
        if values.get("coop"):
            values["coop"] = coop or (values["coop"] if model == "mini" else "")
        prompt = values.get("templates") or ("coop" if "coop" in values else "")
        if entry.get("not_for") != model and (values.get("coop") or "coop" not in values):
            rows.append((entry.get("label", f"{values['method']} + {prompt}"), values))
    return [row for row in rows if not only or row[1]["method"] in only]


def _do(
    cells: Sequence[Cell], jobs: int, spread: Spread | None
) -> tuple[list[Cell], pd.DataFrame, list[Run], dict[str, str]]:
    """The cells whose rows are whole, a line per run and image, the runs without their records.

    And the rows that failed: label -> why.
    """
    configs = [cell.config for cell in cells]
    logs = [Path(c.out) / "logs" / f"{i + 1:03d}.log" for i, c in enumerate(configs)]
    frames, runs, failed, ended = {}, {}, {}, 0
    if not spread:
        start_server()
    for i, done in spread(configs) if spread else run_many(configs, logs, jobs):
        cell, ended = cells[i], ended + 1
        if isinstance(done, Run):
            frames[i], runs[i] = images_of(cell, done), dataclasses.replace(done, records=[])
            text = f"{100 * frames[i]['right'].mean():5.1f} %"
        else:
            text = f"failed, {done}"
            failed.setdefault(cell.label, f"{cell.variant}, seed {cell.seed}: {done}")
        said = f"[{ended}/{len(cells)}] {cell.variant}, seed {cell.seed}"
        print(f"{said}, {cell.label}: {text}", flush=True)
    whole = [i for i, cell in enumerate(cells) if cell.label not in failed]
    if not whole:
        raise ValueError("every row failed, the first: {}: {}".format(*next(iter(failed.items()))))
    frames, runs = ([part[i] for i in whole] for part in (frames, runs))
    return [cells[i] for i in whole], pd.concat(frames), runs, failed


def peak_memory(done: Run, session: Session, images: int = 8) -> float:
    """Bytes that adapting allocates at its peak, beyond features and text features.

    Of an episodic method per image, of another for all images of the run.
    """
    kept, config = done.dir / "peak.json", done.config
    if kept.is_file():
        return json.loads(kept.read_text())["bytes"]
    method, options = registry.get(config.method), options_of(config)
    whole, _ = data_of(config)
    count = min(images, len(whole)) if method.kind == "episodic" else len(whole)
    data = datasets.subset(whole, list(range(count)))
    clip, prompts = session.model(config), session.prompts(config, data.classnames)
    augmenter, cache = augmenter_of(config, clip.image_size), Path(config.cache)
    views = features.encode(data, clip, augmenter, config.seed, cache, 0, progress=False)
    setting = Setting(clip, prompts, data, augmenter, config, cache, config.seed, config.device)
    ready = method.ready(options, setting)
    batch = views.features.to(clip.device)
    ready.adapt(batch[:images], prompts, views.ids[:images])  # what is made once is not counted
    peak = _peak(lambda: ready.adapt(batch, prompts, views.ids), clip.device)
    peak /= count if method.kind == "episodic" else 1
    write_json(kept, {"bytes": peak})
    return peak


def _peak(step: Callable[[], object], device: torch.device) -> float:
    """Bytes that a call has allocated at once, at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return float(np.cumsum([nbytes for _, nbytes in sorted(changes)]).max(initial=0))


def _check(stored: Mapping) -> int:
    """Say which rows of a stored table are of other runs than those of today."""
    plain = {"variants": [], "methods": [], "seeds": 1, "orders": 3, "overrides": {}}
    asked = stored["about"].get("asked", plain)
    grid = read_yaml(Path(LeaderboardOptions().grid), KEYS)
    cells, data = cells_of(grid, **asked)
    now: dict[str, list[str]] = {}
    for cell in cells:
        now.setdefault(cell.label, []).append(hash_of(cell.config))
    then = {row["row"]: row.get("runs") for row in stored["rows"]}
    bad = [label for label in {**then, **now} if then.get(label) != now.get(label)]
    bad += [v for v in data if data[v] != stored["about"].get("data", {}).get(v)]
    print(f"{STORED.name}: " + (f"not of the runs of today: {', '.join(bad)}" if bad else "fresh"))
    return 1 if bad else 0
