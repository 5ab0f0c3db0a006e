"""The stored tables as a lesson reads them: by kind, by variant, without the set that carries it.

Input is what ``python -m tpt_nb leaderboard``, ``python -m tpt_nb streams`` and ``ci/attempts.py``
write to ``data/``. Accuracies and gains are fractions there, per cent and points here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tpt_nb import methods
from tpt_nb.core.paths import DATA

KINDS = ("episodic", "online", "transductive")
PARTS = {"ARS": ("mean_shifted", "shifted"), "RS": ("mean_shifted_rest", "rest")}
Row = Mapping


def read(name: str, path: str = "") -> dict:
    """A table of ``data/`` by its name ("leaderboard"), or the one at ``path``."""
    return json.loads((Path(path) if path else DATA / f"{name}.json").read_text())


def points(gain: Sequence[float]) -> tuple[float, float, float]:
    """(gain, low, high) as fractions -> points."""
    value, low, high = (100 * x for x in gain)
    return value, low, high


def interval(gain: Sequence[float]) -> str:
    """(gain, low, high) as fractions -> "+1.0 [-0.4, +2.4]" in points."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points(gain))


def short(table: Mapping) -> dict[str, str]:
    """Variant -> the letter or word that a table's head has room for."""
    letters = {"iconshift": "I", "iconshift-sketch": "Sketch"}
    names = {v: letters.get(v, v.removeprefix("iconshift-")) for v in table["variants"]}
    return {v: s.upper() if len(s) <= 2 else s for v, s in names.items()}


def parts(table: Mapping) -> dict[str, tuple[str, str]]:
    """Head of a mean -> (its key in a row, its key in the gains); RS only if a set was left out."""
    return {head: keys for head, keys in PARTS.items() if head == "ARS" or table["rest"]}


def rows(table: Mapping, kind: str = "", prompt: str = "single") -> list[Row]:
    """The rows of a kind ("" for all) under one prompt, best first in the mean of A, R, Sketch."""
    some = [r for r in table["rows"] if kind in ("", r["kind"]) and r["prompt"] == prompt]
    return sorted(some, key=lambda r: -r["mean_shifted"])


def gain_on(row: Row, over: str, where: str) -> tuple[float, float, float] | None:
    """Gain of a row in points, on a variant or on "shifted" or "rest"; None: not against itself."""
    gains = row["variants"][where]["gains"] if where in row["variants"] else row["gains"]
    if row["row"] == over or over not in gains:
        return None
    found = gains[over] if where in row["variants"] else gains[over].get(where)
    return found and points(found)


def about(table: Mapping) -> str:
    """What was measured, on what, and what is missing: lines to stand above the tables."""
    names, ranked = short(table), sorted(table["rows"], key=lambda r: -r["mean_shifted"])
    per = [cell for row in ranked for cell in row["variants"].values()]
    halves = [50 * (cell["ci95"][1] - cell["ci95"][0]) for cell in per]
    counts = ", ".join(f"{names[v]} {ranked[0]['variants'][v]['n']}" for v in names)
    encoding = 1000 * max(row["encode_seconds"] for row in ranked)
    here = table["about"]
    lines = [
        f"{here['model']}, {here['device']}; images: {counts}",
        f"seeds of the views: {table['seeds']}",
        f"encoding {here['n_aug'] + 1} views: {encoding:.0f} ms per image",
        f"half width of the 95 % interval of an accuracy: {min(halves):.1f} to {max(halves):.1f} "
        "points",
        f"settings: {', '.join(sorted({row['settings'] for row in ranked}))} for all variants",
    ]
    lines += [f"FAILED: {name}, {why}" for name, why in table["failed"].items()]
    known = {row["row"] for row in ranked} | set(table["failed"])
    absent = [m for m in methods.names() if not methods.get(m).needs and m not in known]
    if absent:
        lines.append(
            f"NOT IN THIS TABLE YET: {', '.join(absent)} "
            "(python -m tpt_nb leaderboard --write adds them)"
        )
    return "\n".join(lines)


def by_kind(table: Mapping, streams: Mapping | None = None) -> dict[str, pd.DataFrame]:
    """Kind -> accuracy (%) per variant, means with and without the left-out set, gains, price.

    ``streams``: the rows of ``streams.json``, for the tails of the methods that keep something.
    """
    ranked = sorted(table["rows"], key=lambda r: -r["mean_shifted"])
    found = {}
    for kind in KINDS:
        lines = {r["row"]: _line(table, r, streams or {}) for r in ranked if r["kind"] == kind}
        if lines:
            found[kind] = pd.DataFrame(lines).T.fillna("").rename_axis(kind)
    return found


def _line(table: Mapping, row: Row, streams: Mapping) -> dict:
    line = {s: f"{100 * row['variants'][v]['accuracy']:.1f}" for v, s in short(table).items()}
    for head, (mean, _) in parts(table).items():
        line[head] = f"{100 * row[mean]:.1f}"
    for head, (_, where) in parts(table).items():
        against = gain_on(row, "vote", where)
        line[f"over the vote, {head}"] = _text(against)
    tail = streams.get(row["row"], {}) if row["kind"] != "episodic" else {}
    for kind in [k for k in ("shuffled", "sorted") if k in tail]:
        line[f"tail, {kind}"] = f"{100 * tail[kind]['tail']:.1f}"
    line["ms"] = f"{1000 * row['seconds']:.1f}"
    return line | {"MB": "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.1f}"}


def _text(gain: Sequence[float] | None) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain) if gain else ""


def against(table: Mapping, over: str, some: Sequence[Row]) -> tuple[list, list, list]:
    """Names of rows, heads, and the gain of each row over ``over`` on each variant and mean.

    For ``figures.wins``: gains ``[rows][heads]``, in points; None for the row itself.
    """
    heads = {s: v for v, s in short(table).items()}
    heads |= {head: where for head, (_, where) in parts(table).items()}
    gains = [[gain_on(row, over, where) for where in heads.values()] for row in some]
    return [row["row"] for row in some], list(heads), gains


def places(table: Mapping) -> pd.DataFrame:
    """The place of each row under one prompt: on every variant, in the mean, and without A."""
    some = rows(table)
    values = {s: [r["variants"][v]["accuracy"] for r in some] for v, s in short(table).items()}
    values |= {head: [r[mean] for r in some] for head, (mean, _) in parts(table).items()}
    ranks = pd.DataFrame(values, index=[r["row"] for r in some])
    return ranks.rank(ascending=False, method="min").astype(int).rename_axis("place")


def above(table: Mapping, over: str = "vote") -> pd.DataFrame:
    """Per variant and mean: which rows beat ``over`` by an interval above 0, in points."""
    out: dict[str, dict[str, str]] = {}
    for kind in KINDS:
        names, heads, gains = against(table, over, rows(table, kind))
        for head, column in zip(heads, zip(*gains, strict=True), strict=True):
            won = [(g[0], n) for g, n in zip(column, names, strict=True) if g and g[1] > 0]
            out.setdefault(kind, {})[head] = ", ".join(
                f"{n} {value:+.1f}" for value, n in sorted(won, reverse=True)
            )
    return pd.DataFrame(out).rename_axis(f"beat the {over} on")


def calibration(table: Mapping) -> pd.DataFrame:
    """ECE by variant in per cent and, in brackets, mean confidence minus accuracy (its sign)."""
    lines = {}
    for row in rows(table):
        cells = {s: row["variants"][v] for v, s in short(table).items()}
        lines[row["row"]] = {
            s: f"{100 * c['ece']:.0f} ({100 * c['overconfidence']:+.0f})" for s, c in cells.items()
        }
        rest = [row["variants"][v]["ece"] for v in table["rest"]]
        lines[row["row"]]["mean"] = f"{100 * row['ece']:.0f}"
        lines[row["row"]] |= {"RS": f"{100 * np.mean(rest):.0f}"} if rest else {}
    return pd.DataFrame(lines).T.rename_axis("ECE (sign)")


def too_sure(row: Row) -> str:
    """ "ECE 36, too unsure by 36 points"."""
    over = 100 * row["overconfidence"]
    side = "too sure" if over > 0 else "too unsure"
    return f"ECE {100 * row['ece']:.0f}, {side} by {abs(over):.1f} points"


def losses(table: Mapping, start: str = "zero_shot") -> list[tuple[tuple, str, str]]:
    """(gain over ``start`` in points, row, variant) for each row and variant, worst first."""
    names = short(table)
    some = [row for row in rows(table) if row["row"] != start]
    return sorted((gain_on(row, start, v), row["row"], names[v]) for row in some for v in names)


def attempts(tried: Sequence[Mapping]) -> pd.DataFrame:
    """What was tried on development data: accuracy (%) per set, mean, gain over the vote."""
    lines = {}
    for row in tried:
        line = {s: f"{100 * a:.1f}" for s, a in row["accuracy"].items()}
        line["mean"] = f"{100 * row['mean']:.1f}"
        if "gain_over_vote" in row:
            line["over the vote"] = interval(row["gain_over_vote"])
        lines[row["attempt"]] = line
    return pd.DataFrame(lines).T.rename_axis("attempt")


def streams(stored: Mapping) -> pd.DataFrame:
    """Accuracy (%) by kind of stream; behind it, for what keeps something, the tail."""
    told = stored["labels"]
    kinds = [*dict.fromkeys(k for r in stored["rows"].values() for k in r)]
    lines = {}
    for name in sorted(stored["rows"], key=lambda m: not told[m]["moves"]):
        row, moves = stored["rows"][name], told[name]["moves"]
        lines[name] = {
            k: f"{100 * row[k]['mean']:.1f}" + (f" ({100 * row[k]['tail']:.1f})" if moves else "")
            for k in kinds
            if k in row
        }
        lines[name]["orders"] = next(iter(row["shuffled"]["sets"].values()))["orders"]
    return pd.DataFrame(lines).T.fillna("").rename_axis("accuracy in %")


def damages(stored: Mapping) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Accuracy (%) of each method under each damage, and the names of damages and attacks."""
    groups = {c["name"]: c["group"] for c in stored["columns"]}
    harms, attacks = ([c for c, g in groups.items() if g == k] for k in ("damage", "attack"))
    lines = {
        row["row"]: {c: 100 * row["columns"][c]["accuracy"] for c in ("clean", *harms, *attacks)}
        for row in stored["rows"]
    }
    table = pd.DataFrame(lines).T.rename_axis("accuracy in %")
    table.insert(1, "mean of damages", table[harms].mean(axis=1))
    return table, harms, attacks
