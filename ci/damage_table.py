"""Methods under damage and under attack, as a table.

    python ci/damage_table.py            the table of notebooks/sweeps/damage.yaml
    python ci/damage_table.py --write    stores it as data/damage.json, where notebook 10 reads it

Columns are data sets with the same images: clean, damaged, attacked. A cell is a run of the engine,
so that what is there is not computed again. Intervals are paired over images; a mean over columns
is first taken for each image, as the columns show the same ones.
"""

import argparse
import functools
import multiprocessing
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from tpt_nb import datasets, features, metrics, models, runs  # noqa: E402
from tpt_nb.core.files import write_json  # noqa: E402
from tpt_nb.core.paths import DATA  # noqa: E402
from tpt_nb.datasets.imagenet_c import DAMAGES  # noqa: E402
from tpt_nb.runs.sweep import read_yaml  # noqa: E402

STORED = DATA / "damage.json"
GRID = REPO / "notebooks" / "sweeps" / "damage.yaml"
KEYS = ("source", "n", "damages", "severities", "attack", "common", "rows")
CLEAN, BASE = "clean", "zero_shot"


def columns_of(grid: Mapping) -> list[dict]:
    """The data sets of the table: name, and damage and severity or eps."""
    kinds = list(DAMAGES) if grid["damages"] == "all" else grid["damages"]
    out = [{"name": CLEAN, "group": CLEAN}]
    for severity in grid["severities"]:
        for kind in kinds:
            one = {"damage": kind, "severity": severity}
            out.append({"name": f"{kind} {severity}", "group": "damage", **one})
    for eps in grid["attack"]["eps"]:
        out.append({"name": f"attack {eps}/255", "group": "attack", "eps": eps})
    return out


@functools.cache
def source_of(name: str, stream: int) -> datasets.Dataset:
    """The images of the longest stream, each composed once."""
    data = datasets.load(name, n=stream)
    return replace(data, fetch=functools.cache(data.fetch))


def images_of(column: Mapping, grid: Mapping, clip: models.Clip) -> datasets.Dataset:
    """The images of a column, as many as the longest stream has; of an attack the n."""
    stream = max(row.get("stream", grid["n"]) for row in grid["rows"])
    data = source_of(grid["source"], stream)
    if "damage" in column:
        data = datasets.corrupted(data, column["damage"], column["severity"])
    if "eps" in column:
        data = datasets.subset(data, datasets.balanced_subset(data.targets, grid["n"], 0))
        pgd = features.Pgd(column["eps"], grid["attack"]["steps"])
        data = features.attacked(data, clip, pgd, progress=False)
    return replace(data, fetch=functools.cache(data.fetch))


def do_column(column: Mapping, grid: Mapping, out: str) -> list[dict]:
    """A line per row of the grid: who was right, by image, and seconds per image."""
    torch.set_num_threads(1)
    config = runs.RunConfig.from_dict(grid["common"])
    data = images_of(column, grid, models.load(config.model))
    name = f"{grid['source']}+{column['name'].replace(' ', '-').replace('/', '-')}"
    datasets.register(name, lambda root, classnames: data)
    wanted = datasets.load(name, n=grid["n"]).ids  # a part of every stream
    session, lines = runs.Session(), []
    for row in grid["rows"]:
        values = {k: v for k, v in row.items() if k not in ("label", "stream")}
        size = min(row.get("stream", grid["n"]), len(data))
        more = {"dataset": name, "reduced_size": size, "out": out, "workers": 0}
        done = runs.run(config.replace(**values, **more), session, progress=False)
        frame = done.frame.set_index("id").loc[wanted]
        lines.append(
            {
                "row": row.get("label", row["method"]),
                "column": column["name"],
                "right": metrics.correct(frame.reset_index()).astype(float),
                "confidence": frame["conf_after"].to_numpy(),
                "seconds": done.summary["seconds"]["method"] / max(1, done.summary["n"]),
            }
        )
        print(f"{column['name']}, {lines[-1]['row']}: {lines[-1]['right'].mean():.3f}", flush=True)
    data.fetch.cache_clear()
    return lines


def summarise(columns: list[dict], lines: list[dict]) -> list[dict]:
    """Per row: accuracy and paired gain over zero-shot by column and over the damages."""
    cells = {(line["row"], line["column"]): line for line in lines}
    labels = list(dict.fromkeys(line["row"] for line in lines))
    damages = [c["name"] for c in columns if c["group"] == "damage"]

    def right(label: str, names: list[str]) -> np.ndarray:
        return np.mean([cells[label, name]["right"] for name in names], axis=0)

    def against(label: str, names: list[str]) -> list[float]:
        return list(metrics.mean_gain([right(BASE, names)], [right(label, names)], resamples=4000))

    rows = []
    for label in labels:
        row = {"row": label, "columns": {}}
        for column in columns:
            cell = cells[label, column["name"]]
            row["columns"][column["name"]] = {
                "accuracy": float(cell["right"].mean()),
                "gain": against(label, [column["name"]]),
                "ece": metrics.calibration_error(cell["confidence"], cell["right"]),
            }
        row["damage"] = {"accuracy": float(right(label, damages).mean())}
        row["damage"]["gain"] = against(label, damages)
        row["seconds"] = float(np.mean([cells[label, c["name"]]["seconds"] for c in columns]))
        rows.append(row)
    return rows


def text_table(columns: list[dict], rows: list[dict]) -> str:
    """For people, in per cent; gains in points."""
    lines = []
    for row in rows:
        line = {"row": row["row"]}
        line |= {c["name"]: f"{100 * row['columns'][c['name']]['accuracy']:.0f}" for c in columns}
        line["damaged"] = f"{100 * row['damage']['accuracy']:.1f}"
        line["gain"] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(
            *(100 * x for x in row["damage"]["gain"])
        )
        lines.append(line | {"ms": f"{1000 * row['seconds']:.0f}"})
    return pd.DataFrame(lines).set_index("row").T.to_string()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", default=str(GRID))
    parser.add_argument("--out", default=str(REPO / "runs" / "damage"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="columns at a time, in processes")
    parser.add_argument("--write", action="store_true", help=f"store it as {STORED.name}")
    asked = parser.parse_args()
    grid = read_yaml(Path(asked.grid), KEYS)
    columns = columns_of(grid)
    do = functools.partial(do_column, grid=grid, out=asked.out)
    if asked.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
            parts = pool.map(do, columns, chunksize=1)
    else:
        parts = [do(column) for column in columns]
    rows = summarise(columns, [line for part in parts for line in part])
    print(text_table(columns, rows))
    if asked.write:
        clip = models.load(grid["common"]["model"])
        about = {"model": clip.name, "fingerprint": clip.fingerprint} | {
            key: grid[key] for key in ("source", "n", "attack", "common", "rows")
        }
        write_json(STORED, {"about": about, "columns": columns, "rows": rows})
        print(f"-> {STORED}")


if __name__ == "__main__":
    main()
