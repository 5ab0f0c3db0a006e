"""Every method on the same views, in one table: ``python -m tpt_nb leaderboard``.

A grid of runs: rows x variants x seeds of the views (x orders of the stream, for online methods).
Rows are the methods that need features alone, under one prompt, and those of the grid file, which
also names the variants and the row that the others are held against.

Accuracies are means over seeds and orders; intervals come from drawing images again, each with its
mean. Seconds are of adapting from encoded features, on this machine: more than one run at a time
makes them longer. Memory is the peak of what a batch of 8 allocates, divided by 8.
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

from tpt_nb import datasets, features, metrics
from tpt_nb import methods as registry
from tpt_nb.core.command_line import setting
from tpt_nb.core.files import write_json, write_whole
from tpt_nb.core.machine import device_name, versions
from tpt_nb.core.paths import DATA, REPO
from tpt_nb.methods import Setting
from tpt_nb.runs.config import RunConfig, augmenter_of, identity, options_of, short_hash
from tpt_nb.runs.engine import Session
from tpt_nb.runs.pool import Spread, run_many, start_server
from tpt_nb.runs.profile import resolve
from tpt_nb.runs.records import Run
from tpt_nb.runs.sweep import read_yaml

STORED = DATA / "leaderboard.json"
KEYS = ("rows", "common", "variants", "decisive", "reference")


@dataclass(frozen=True)
class LeaderboardOptions:
    """Options of ``leaderboard`` beside those of ``evaluate``, which override the grid's."""

    variants: list[str] = setting((), "data sets; default: those of the grid")
    methods: list[str] = setting((), "only these; default: every one")
    seeds: int = setting(1, "of the views")
    orders: int = setting(3, "of the stream per seed, for online methods")
    jobs: int = setting(1, "runs at a time; more than one makes the seconds longer")
    grid: str = setting(str(REPO / "notebooks" / "sweeps" / "leaderboard.yaml"), "YAML file")
    json: bool = setting(False, "end with one JSON object on a line")
    write: bool = setting(False, "store it as data/leaderboard.json")
    check: bool = setting(False, "only say which rows of data/leaderboard.json are out of date")


@dataclass(frozen=True)
class Cell:
    """One run of the table, and where it belongs."""

    label: str
    prompt: str
    variant: str
    seed: int
    config: RunConfig


def leaderboard(
    options: LeaderboardOptions, overrides: Mapping | None = None, spread: Spread | None = None
) -> int:
    """Do the runs that are missing and print the table; returns the exit code.

    Args and errors as of ``sweep``; ``ValueError`` too for the first run that fails, after all.
    With ``check`` nothing is run: 1 if a stored row is not of the runs that would be done now.
    """
    if options.check:
        return _check(json.loads(STORED.read_text()))
    if min(options.seeds, options.orders, options.jobs) < 1:
        raise ValueError("seeds, orders and jobs must be at least 1.")
    asked: dict = {name: list(getattr(options, name)) for name in ("variants", "methods")}
    asked |= {"seeds": options.seeds, "orders": options.orders}
    asked |= {"overrides": {k: v for k, v in (overrides or {}).items() if k != "out"}}
    out = Path((overrides or {}).get("out") or "runs/leaderboard")
    grid = read_yaml(Path(options.grid), KEYS)
    cells, data = cells_of(grid, out=str(out), **asked)
    images, runs = _do(cells, options.jobs, spread)
    session, config = Session(), runs[0].config
    about = {"model": config.model, "fingerprint": session.model(config).fingerprint}
    about |= {"n_aug": max(run.config.n_aug for run in runs), "orders": options.orders}
    about |= {"device": device_name(config.device), "machine": platform.machine()}
    asked["overrides"]["device"] = config.device.split(":")[0]
    about |= {"versions": versions(), "asked": asked, "data": data}
    table = {"about": about, **summarise(cells, images, runs, grid)}
    for row in table["rows"]:
        first = next(i for i, cell in enumerate(cells) if cell.label == row["row"])
        row["bytes"] = peak_memory(runs[first], session)
    print(text_table(table))
    if options.write:
        write_whole(STORED, json.dumps(table) + "\n")
        print(f"-> {STORED}")
    if options.json:
        print(json.dumps(table))
    return 0


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
        online = registry.get(config.method).kind == "online"
        prompt = config.templates or ("coop" if config.coop else "single")
        for variant, whole in wholes.items():
            n = min(config.reduced_size or len(whole), len(whole))
            for seed in range(seeds):
                run = config.replace(dataset=variant, reduced_size=n, seed=seed)
                several = [{"order": seed * orders + k} for k in range(orders)] if online else [{}]
                cells += [
                    Cell(label, prompt, variant, seed, run.replace(**order)) for order in several
                ]
    return cells, {variant: whole.fingerprint for variant, whole in wholes.items()}


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


def _do(cells: Sequence[Cell], jobs: int, spread: Spread | None) -> tuple[pd.DataFrame, list[Run]]:
    """A line per run and image, and the runs, without their records."""
    configs = [cell.config for cell in cells]
    logs = [Path(c.out) / "logs" / f"{i + 1:03d}.log" for i, c in enumerate(configs)]
    frames, runs, errors = {}, {}, {}
    if not spread:
        start_server()
    for i, done in spread(configs) if spread else run_many(configs, logs, jobs):
        cell = cells[i]
        if isinstance(done, Run):
            frames[i], runs[i] = _images(cell, done), dataclasses.replace(done, records=[])
            text = f"{100 * frames[i]['right'].mean():5.1f} %"
        else:
            errors[i] = text = f"failed, {done}"
        said = f"[{len(runs) + len(errors)}/{len(cells)}] {cell.variant}, seed {cell.seed}"
        print(f"{said}, {cell.label}: {text}", flush=True)
    if errors:
        i = min(errors)
        raise ValueError(f"{len(errors)} runs failed, the first: {cells[i].label}: {errors[i]}")
    frames, runs = ([part[i] for i in range(len(cells))] for part in (frames, runs))
    return pd.concat(frames), runs


def _images(cell: Cell, done: Run) -> pd.DataFrame:
    r = done.frame[["id"]].assign(label=cell.label, variant=cell.variant, seed=cell.seed)
    return r.assign(
        order=done.config.options.get("order", 0),
        right=metrics.correct(done.frame).astype(float),
        before=metrics.correct(done.frame, "before").astype(float),
        confidence=done.frame["conf_after"],
        log_prob=np.log(done.frame["prob_target_after"].clip(lower=1e-45)),
    )


def peak_memory(done: Run, session: Session, images: int = 8) -> float:
    """Bytes per image that adapting allocates at its peak, beyond features and text features."""
    kept, config = done.dir / "peak.json", done.config
    if kept.is_file():
        return json.loads(kept.read_text())["bytes"]
    whole = datasets.load(config.dataset, config.reduced_size, config.subset_seed, config.root)
    data = datasets.subset(whole, list(range(min(images, len(whole)))))
    clip, prompts = session.model(config), session.prompts(config, data.classnames)
    augmenter, cache = augmenter_of(config, clip.image_size), Path(config.cache)
    views = features.encode(data, clip, augmenter, config.seed, cache, 0, progress=False)
    setting = Setting(clip, prompts, data, augmenter, config, cache, config.seed, config.device)
    ready = registry.get(config.method).ready(options_of(config), setting)
    batch = views.features.to(clip.device)
    ready.adapt(batch, prompts, views.ids)  # what is made once is not counted
    per_image = _peak(lambda: ready.adapt(batch, prompts, views.ids), clip.device) / len(batch)
    write_json(kept, {"bytes": per_image})
    return per_image


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


# --- the table -----------------------------------------------------------------------------------


def summarise(cells: Sequence[Cell], images: pd.DataFrame, runs: Sequence[Run], grid) -> dict:
    """The table: per row and variant accuracy, ECE and so on; means, gains, wins."""
    labels, variants = ([*dict.fromkeys(images[name])] for name in ("label", "variant"))
    groups = dict(list(images.groupby(["label", "variant"])))
    # per image the mean over seeds and orders, in the order of the data set
    means = {key: g.groupby("id", sort=False).mean(numeric_only=True) for key, g in groups.items()}
    decisive = [v for v in variants if v in grid["decisive"]] or variants
    right = {label: [means[label, v]["right"].to_numpy() for v in decisive] for label in labels}
    start = [means[labels[0], v]["before"].to_numpy() for v in decisive]  # under the one prompt
    rows = []
    for label in labels:
        mine = [(cell, run) for cell, run in zip(cells, runs, strict=True) if cell.label == label]
        row = _row(label, mine, {v: groups[label, v] for v in variants}, means)
        row["mean_shifted"] = float(np.mean([x.mean() for x in right[label]]))
        row["gain_over_zero_shot"] = metrics.mean_gain(start, right[label])
        if grid["reference"] in labels:
            gain = metrics.mean_gain(right[grid["reference"]], right[label])
            row[f"gain_over_{grid['reference']}"] = gain
        rows.append(row)
    wins = {
        a: {b: metrics.mean_gain(right[b], right[a], resamples=4000) for b in labels if b != a}
        for a in labels
    }
    absent = [m for m in registry.names() if m not in labels and not registry.get(m).needs]
    return {"variants": variants, "decisive": decisive, "seeds": images["seed"].nunique(),
            "rows": rows, "absent": absent, "wins": wins}  # fmt: skip


def _row(label: str, mine: list[tuple[Cell, Run]], groups: Mapping, means: Mapping) -> dict:
    """What a row says of itself; ``groups``: variant -> its images in all seeds and orders."""
    config = mine[0][1].config
    method = registry.get(config.method)
    row = {"row": label, "method": config.method, "prompt": mine[0][0].prompt}
    row |= {"online": method.kind == "online", "tunes": method.tunes != "nothing"}
    row |= {"published": bool(method.paper), "variants": {}}
    row["runs"] = [hash_of(run.config) for _, run in mine]
    firsts = []
    for variant, g in groups.items():
        x = means[label, variant]["right"].to_numpy()
        firsts.append(g[g["order"] == g.groupby("seed")["order"].transform("min")])
        bins = metrics.reliability(firsts[-1]["confidence"], firsts[-1]["right"])
        times = [_seconds(run.summary) for cell, run in mine if cell.variant == variant]
        adapt, encode = np.mean(times, axis=0)
        row["variants"][variant] = {
            "n": len(x),
            "accuracy": float(x.mean()),
            "ci95": metrics.bootstrap_difference(np.zeros(len(x)), x, resamples=4000),
            "by_seed": g.groupby("seed")["right"].mean().tolist(),
            "ece": float((bins.n * (bins.accuracy - bins.confidence).abs()).sum() / bins.n.sum()),
            "log_prob": float(g["log_prob"].mean()),
            "seconds": float(adapt),
            "encode_seconds": float(encode),
        }
    per = pd.DataFrame(row["variants"].values())
    row["mean"] = float(per["accuracy"].mean())
    row |= {name: float(per[name].mean()) for name in ("ece", "seconds", "encode_seconds")}
    # every data set weighs the same in a diagram, too
    both = pd.concat(firsts)
    diagram = metrics.reliability(both["confidence"], both["right"])
    return row | {"reliability": {c: diagram[c].round(5).tolist() for c in diagram}}


def _seconds(summary: Mapping) -> tuple[float, float]:
    """Of the method for an image, without writing records; and of encoding it."""
    new = max(1, summary["n"] - summary["resumed"])
    seconds = summary["seconds"]
    return seconds["method"] / new, summary["seconds_per_image"] - seconds["adapt"] / new


def hash_of(config: RunConfig) -> str:
    """That of the run in its ``config.json``."""
    return short_hash(identity(resolve(config)[0]))


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


def text_table(table: Mapping) -> str:
    """The table for people, in per cent, best first."""
    lines = []
    for row in sorted(table["rows"], key=lambda row: -row["mean_shifted"]):
        line = {"row": row["row"] + (" (online)" if row["online"] else "")}
        per = row["variants"].items()
        line |= {v.removeprefix("iconshift-"): f"{100 * x['accuracy']:.1f}" for v, x in per}
        line |= {"mean": f"{100 * row['mean']:.1f}", "mean*": f"{100 * row['mean_shifted']:.1f}"}
        for name in [name for name in row if name.startswith("gain_over_")]:
            gain = [100 * x for x in row[name]]
            text = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain) if any(gain) else ""
            line[name.removeprefix("gain_").replace("_", " ")] = text
        line |= {"ECE": f"{100 * row['ece']:.1f}", "ms/img": f"{1000 * row['seconds']:.1f}"}
        lines.append(line | {"MB/img": f"{row['bytes'] / 2**20:.2f}"})
    return pd.DataFrame(lines).to_string(index=False) + f"\nmean*: over {table['decisive']}"
