"""The tables of the leaderboard, made from the records of its runs.

A row is a method under a prompt, of one of three kinds: episodic (one image at a time), online
(what it learns it keeps) and transductive (all images at once). Each has, by variant and over all
of them, accuracy, calibration error, seconds, and what it gains over the reference rows, image by
image. The *decisive* variants are those that nothing was chosen on; their *rest* leaves out the one
whose large gains can carry a mean alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tpt_nb import methods as registry
from tpt_nb import metrics
from tpt_nb.core.paths import DATA
from tpt_nb.methods.method import KINDS
from tpt_nb.runs.config import RunConfig, identity, short_hash
from tpt_nb.runs.profile import resolve
from tpt_nb.runs.records import Run

STREAMS = DATA / "streams.json"
TAILS = ("shuffled", "sorted")  # the kinds of stream whose tail stands in the table
FEW = 4000  # resamples, where there are hundreds of intervals: ends move by less than 0.1 point


@dataclass(frozen=True)
class Cell:
    """One run of the table, and where it belongs."""

    label: str
    prompt: str
    variant: str
    seed: int
    config: RunConfig


def hash_of(config: RunConfig) -> str:
    """That of the run in its ``config.json``."""
    return short_hash(identity(resolve(config)[0]))


def images_of(cell: Cell, done: Run) -> pd.DataFrame:
    """A line per image of a run, with what the table needs of its record."""
    r = done.frame[["id"]].assign(label=cell.label, variant=cell.variant, seed=cell.seed)
    return r.assign(
        order=done.config.options.get("order", 0),
        right=metrics.correct(done.frame).astype(float),
        before=metrics.correct(done.frame, "before").astype(float),
        confidence=done.frame["conf_after"],
        log_prob=np.log(done.frame["prob_target_after"].clip(lower=1e-45)),
    )


# --- the numbers ---------------------------------------------------------------------------------


def summarise(cells: Sequence[Cell], images: pd.DataFrame, runs: Sequence[Run], grid) -> dict:
    """The table: per row and variant accuracy, ECE and so on; means, gains, wins.

    Args:
        images: the lines of :func:`images_of` of all runs.
        grid: "decisive", "left_out", "start" and "references", see the grid file.
    """
    labels, variants = ([*dict.fromkeys(images[name])] for name in ("label", "variant"))
    groups = dict(list(images.groupby(["label", "variant"])))
    # per image the mean over seeds and orders, in the order of the data set
    means = {key: g.groupby("id", sort=False).mean(numeric_only=True) for key, g in groups.items()}
    decisive = [v for v in variants if v in grid["decisive"]] or variants
    left_out = [v for v in variants if v in grid.get("left_out", ())]
    rest = [v for v in decisive if v not in left_out]
    parts = {"shifted": decisive, "rest": rest if left_out else []}

    def right(label: str, some: Sequence[str]) -> list[np.ndarray]:
        return [means[label, v]["right"].to_numpy() for v in some]

    def start(some: Sequence[str]) -> list[np.ndarray]:  # zero-shot, under the one prompt
        return [means[labels[0], v]["before"].to_numpy() for v in some]

    against = {grid["start"]: start}
    for name in grid["references"]:
        if name in labels:
            against[name] = lambda some, name=name: right(name, some)
    rows = []
    for label in labels:
        mine = [(cell, run) for cell, run in zip(cells, runs, strict=True) if cell.label == label]
        row = _row(label, mine, {v: groups[label, v] for v in variants}, means)
        row["mean_rest"] = _mean(right(label, [v for v in variants if v not in left_out]))
        row["mean_shifted"] = _mean(right(label, decisive))
        row["mean_shifted_rest"] = _mean(right(label, parts["rest"]))
        row["gains"] = {
            name: {
                part: metrics.mean_gain(base(some), right(label, some))
                for part, some in parts.items()
                if some
            }
            for name, base in against.items()
        }
        for v, cell in row["variants"].items():
            cell["gains"] = {
                name: metrics.mean_gain(base([v]), right(label, [v]), resamples=FEW)
                for name, base in against.items()
            }
        rows.append(row)
    every = {label: right(label, decisive) for label in labels}
    wins = {
        a: {b: metrics.mean_gain(every[b], every[a], resamples=FEW) for b in labels if b != a}
        for a in labels
    }
    absent = [m for m in registry.names() if m not in labels and not registry.get(m).needs]
    return {"variants": variants, "decisive": decisive, "rest": parts["rest"],
            "left_out": left_out, "seeds": images["seed"].nunique(), "rows": rows,
            "absent": absent, "wins": wins}  # fmt: skip


def _mean(values: Sequence[np.ndarray]) -> float | None:
    """Of the means, so that every variant weighs the same; None for no variant."""
    return float(np.mean([x.mean() for x in values])) if values else None


def _row(label: str, mine: list[tuple[Cell, Run]], groups: Mapping, means: Mapping) -> dict:
    """What a row says of itself; ``groups``: variant -> its images in all seeds and orders."""
    config = mine[0][1].config
    method = registry.get(config.method)
    row = {"row": label, "method": config.method, "kind": method.kind, "prompt": mine[0][0].prompt}
    row |= {"tunes": method.tunes != "nothing", "published": bool(method.paper)}
    # the options of a row are the same on all variants; only sentences can belong to a data set
    row["settings"] = "per data set" if config.templates == "dataset" else "one"
    row |= {"paper": method.paper, "variants": {}, "runs": [hash_of(run.config) for _, run in mine]}
    firsts = []
    for variant, g in groups.items():
        x = means[label, variant]["right"].to_numpy()
        firsts.append(g[g["order"] == g.groupby("seed")["order"].transform("min")])
        times = [_seconds(run.summary) for cell, run in mine if cell.variant == variant]
        adapt, encode = np.mean(times, axis=0)
        row["variants"][variant] = {
            "n": len(x),
            "accuracy": float(x.mean()),
            "ci95": metrics.bootstrap_difference(np.zeros(len(x)), x, resamples=FEW),
            "by_seed": g.groupby("seed")["right"].mean().tolist(),
            "ece": metrics.calibration_error(firsts[-1]["confidence"], firsts[-1]["right"]),
            # above 0: surer than right; below: right more often than it believes
            "overconfidence": float((firsts[-1]["confidence"] - firsts[-1]["right"]).mean()),
            "log_prob": float(g["log_prob"].mean()),
            "seconds": float(adapt),
            "encode_seconds": float(encode),
        }
    per = pd.DataFrame(row["variants"].values())
    row["mean"] = float(per["accuracy"].mean())
    for name in ("ece", "overconfidence", "seconds", "encode_seconds"):
        row[name] = float(per[name].mean())
    # every data set weighs the same in a diagram, too
    both = pd.concat(firsts)
    diagram = metrics.reliability(both["confidence"], both["right"])
    return row | {"reliability": {c: diagram[c].round(5).tolist() for c in diagram}}


def _seconds(summary: Mapping) -> tuple[float, float]:
    """Of the method for an image, without writing records; and of encoding it."""
    new = max(1, summary["n"] - summary["resumed"])
    seconds = summary["seconds"]
    return seconds["method"] / new, summary["seconds_per_image"] - seconds["adapt"] / new


# --- for people ----------------------------------------------------------------------------------


def stream_numbers(path: Path = STREAMS) -> dict:
    """Row -> kind of stream -> mean and tail, as ``streams`` stored it; {} if it has not."""
    return json.loads(path.read_text())["rows"] if path.is_file() else {}


def text_table(table: Mapping, streams: Mapping | None = None) -> str:
    """The table for people, in per cent: a part for each kind, best first."""
    streams, parts = stream_numbers() if streams is None else streams, []
    for kind in KINDS:
        rows = [row for row in table["rows"] if row["kind"] == kind]
        rows.sort(key=lambda row: -row["mean_shifted"])
        if rows:
            lines = [_line(row, streams.get(row["row"], {})) for row in rows]
            parts.append(f"{kind}\n" + pd.DataFrame(lines).fillna("").to_string(index=False))
    notes = [f"mean*: over {', '.join(table['decisive'])}"]
    if table["rest"]:
        notes.append(f"-{', '.join(table['left_out'])}: without it, {', '.join(table['rest'])}")
    notes += [f"FAILED {label}: {why}" for label, why in table.get("failed", {}).items()]
    return "\n\n".join(parts) + "\n\n" + "\n".join(notes)


def _line(row: Mapping, streams: Mapping) -> dict:
    line = {"row": row["row"]}
    for v, x in row["variants"].items():
        line[v.removeprefix("iconshift-")] = f"{100 * x['accuracy']:.1f}"
    for name, key in (("mean", "mean"), ("mean*", "mean_shifted"), ("rest*", "mean_shifted_rest")):
        if row[key] is not None:
            line[name] = f"{100 * row[key]:.1f}"
    for name, gains in row["gains"].items():
        for part, gain in gains.items():
            points = [100 * x for x in gain]
            text = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points) if any(points) else ""
            line[f"over {name}" + (" (rest)" if part == "rest" else "")] = text
    line["ECE"] = " ".join(f"{100 * x['ece']:.0f}" for x in row["variants"].values())
    for name in TAILS:
        if name in streams:
            line[f"tail, {name}"] = f"{100 * streams[name]['tail']:.1f}"
    line["ms/img"] = f"{1000 * row['seconds']:.1f}"
    line["MB"] = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.2f}"
    return line | {"settings": row["settings"]}
