"""A grid of runs in one table: ``python -m tpt_nb sweep GRID.yaml``.

A grid is a YAML file: ``rows``, a list of mappings from options of ``evaluate`` to values (a list
of values stands for one row each, two lists for all pairs), ``common``, what all rows share, and
``baseline``, the label of the row with which the others are compared image by image. A row may have
a ``label``, and under ``reported`` what goes into the table as it is; ``about`` says what the grid
is. Finished runs are loaded, killed ones go on; rows that fail stop nothing.

The folder ``out`` (runs/<name of the grid>) gets the runs, a log per row, ``table.csv`` and
``table.md``. ``--save STEM`` writes a table to be committed too, without seconds.
"""

import csv
import io
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpt_nb import datasets, metrics, models
from tpt_nb.core.command_line import setting
from tpt_nb.core.files import read_text, write_whole
from tpt_nb.core.messages import unknown
from tpt_nb.runs.config import RunConfig
from tpt_nb.runs.pool import Spread, default_jobs, run_many, start_server
from tpt_nb.runs.profile import start_name
from tpt_nb.runs.records import Run

KEYS = ("rows", "common", "baseline", "about")
ONE_TABLE = ("dataset", "root", "model", "device", "seed", "subset_seed", "reduced_size")


@dataclass(frozen=True)
class SweepOptions:
    """Options of ``sweep`` beside those of ``evaluate``, which override the grid's."""

    jobs: int | None = setting(None, "rows at a time; default: one per core, one on a GPU")
    json: bool = setting(False, "end with one JSON object on a line")
    save: str = setting("", "write STEM.csv and STEM.md too, to be committed")


@dataclass
class Row:
    """One row of the table: options, then a run or why there is none."""

    label: str
    values: dict
    reported: object = None
    run: Run | None = None
    error: str = ""


def sweep(
    grid: str | Path, options: SweepOptions, overrides: Mapping, spread: Spread | None = None
) -> int:
    """Do the rows of a grid and write the table; returns the exit code, 1 if a row failed.

    Args:
        overrides: options of ``evaluate`` that count instead of the grid's; ``out`` is the folder.
        spread: does the runs elsewhere (a cluster); default: in processes here.
    Raises:
        ValueError: the file is no grid, or its table cannot be saved.
    """
    began, path = time.perf_counter(), Path(grid)
    overrides = dict(overrides)
    out = str(overrides.pop("out", "") or Path("runs") / path.stem)
    if "://" in out:
        raise ValueError("out must be a folder here, for the table; cache may be an address")
    baseline, rows, about = read_grid(path, overrides)
    do_rows(rows, Path(out), options.jobs or default_jobs(), spread)
    lines, failed = table(rows, baseline), [row for row in rows if row.error]
    text = markdown(lines, baseline, failed)
    write_whole(Path(out) / "table.csv", as_csv(lines))
    write_whole(Path(out) / "table.md", text)
    if options.save and failed:
        print(f"{options.save} is left as it was: rows failed")
    elif options.save:
        save(Path(options.save), about, rows, lines, text)
    seconds = time.perf_counter() - began
    print(f"\n{text}\n{len(lines)} rows, {len(failed)} failed, {seconds:.0f} s -> {out}/table.csv")
    if options.json:
        failures = [{"label": row.label, "error": row.error} for row in failed]
        result = {"grid": path.stem, "baseline": baseline, "rows": lines, "failed": failures}
        print(json.dumps(result | {"seconds": round(seconds, 1)}))
    return 1 if failed else 0


# --- the grid ------------------------------------------------------------------------------------


def read_yaml(path: Path, keys: Sequence[str]) -> dict:
    """A file of rows; ``ValueError`` if it is no mapping of these keys with a list of rows."""
    import yaml

    text = read_text(path)
    try:
        grid = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a day that is none
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(grid, dict) or not isinstance(grid.get("rows"), list) or not grid["rows"]:
        raise ValueError(f"{path}: expected a mapping with a list of rows")
    if not isinstance(grid.get("common", {}), dict):
        raise ValueError(f"{path}: common is {grid['common']!r}; expected a mapping of options")
    for key in grid:
        if key not in keys:
            raise ValueError(f"{path}: {unknown('key', key, keys)}")
    for number, entry in enumerate(grid["rows"], start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: row {number} is {entry!r}; expected a mapping of options")
    return grid


def read_grid(path: Path, overrides: Mapping) -> tuple[str, list[Row], str]:
    """Label of the baseline row ("" for none), the rows of a grid file, and what it is about.

    Raises ``ValueError`` if the file is no grid. A row whose options are wrong is a failed row.
    """
    grid = read_yaml(path, KEYS)
    entries = [{**grid.get("common", {}), **entry, **overrides} for entry in grid["rows"]]
    rows = [row for entry in entries for row in expand(entry)]
    labels = [row.label for row in rows]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{path}: two rows are called {twice[0]!r}; give them a label")
    baseline = grid.get("baseline", "")
    if baseline and baseline not in labels:
        raise ValueError(f"{path}: {unknown('baseline', baseline, labels)}")
    return baseline, rows, str(grid.get("about", ""))


def expand(entry: Mapping) -> Iterator[Row]:
    """The rows of one entry: a list of values stands for one row each."""
    values = {key: value for key, value in entry.items() if key not in ("label", "reported")}
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    for chosen in itertools.product(*lists.values()):
        own = dict(zip(lists, chosen, strict=True))
        parts = [str(entry["label"])] if entry.get("label") else []
        parts += [f"{key}={value}" for key, value in own.items()]
        label = " ".join(parts) or " ".join(f"{k}={v}" for k, v in values.items())
        yield Row(label, {**values, **own}, entry.get("reported"))


def do_rows(rows: Sequence[Row], out: Path, jobs: int, spread: Spread | None) -> None:
    """Run the rows; fills in their runs and errors."""
    said = 0

    def report(row: Row, result: Run | Exception, log: str = "") -> None:
        nonlocal said
        said += 1
        if isinstance(result, Run):
            row.run, text = result, f"{100 * result.summary['accuracy_after']:.2f} %"
        else:
            row.error = " ".join(str(result).split())
            text = f"failed, {row.error}{log}"
        print(f"[{said}/{len(rows)}] {row.label}: {text}", flush=True)

    if not spread:
        start_server()
    configs: dict[int, RunConfig] = {}
    for i, row in enumerate(rows):
        try:
            configs[i] = RunConfig.from_dict({**row.values, "out": str(out)})
        except (ValueError, TypeError) as error:
            report(row, error)
    positions, todo = list(configs), list(configs.values())
    logs = [out / "logs" / f"{i + 1:02d}.log" for i in positions]
    for k, result in spread(todo) if spread else run_many(todo, logs, jobs):
        report(rows[positions[k]], result, f" (all of it: {logs[k]})" if logs[k].is_file() else "")
    out.mkdir(parents=True, exist_ok=True)


# --- the table -----------------------------------------------------------------------------------


def table(rows: Sequence[Row], baseline: str) -> list[dict]:
    """One dict per finished row: what ran, accuracy with its interval, changes, and against the
    baseline the paired gain with its interval and McNemar's p-value."""
    reference = next((row.run for row in rows if row.run and row.label == baseline), None)
    return [_line(row, row.run, reference) for row in rows if row.run]


def _line(row: Row, done: Run, reference: Run | None) -> dict:
    s, c = done.summary, done.config
    # a row is called by what was run: without a CoOp context none is CoOp's
    label = row.label if c.coop else row.label.replace("CoOp prompt", start_name(c))
    line = {"label": label, "method": c.method, "augmenter": c.augmenter}
    line["loss"] = c.options.get("loss", "")
    line |= {name: getattr(c, name) for name in ("n_aug", "n_patches", "overlap", "augmix")}
    line["dataset"] = s["dataset"]
    line["model"] = Path(c.model).stem if Path(c.model).is_file() else c.model
    line |= {"n": s["n"], "failed_images": s["failed"]["count"], "accuracy": s["accuracy_after"]}
    line["ci_low"], line["ci_high"] = s["accuracy_after_ci95"]
    line["prompt_accuracy"] = s["accuracy_before"]
    line |= {name: s[name] for name in ("improved", "worsened")}
    # the table has no bootstrap interval, so none is drawn
    pair = metrics.compare(reference.records, done.records, resamples=1) if reference else {}
    line |= {"gain_vs_baseline": pair.get("gain"), "p_vs_baseline": pair.get("p_value")}
    line["gain_ci_low"], line["gain_ci_high"] = pair.get("gain_ci95", (None, None))
    line |= {f"{name}_vs_baseline": pair.get(name) for name in ("improved", "worsened")}
    line |= {"reported": row.reported, "seconds_per_image": s["seconds_per_image"]}
    return line | {"run": done.name}


def markdown(lines: Sequence[Mapping], baseline: str, failed: Sequence[Row]) -> str:
    """The table for people, accuracies in per cent; failures below it."""
    head = ["row", "accuracy %", "95 % interval", "improved", "worsened"]
    head += [f"against {baseline}", "95 % interval", "p"] if baseline else []
    head += ["reported"] if any(line["reported"] is not None for line in lines) else []
    body = []
    for line in lines:
        interval = f"{100 * line['ci_low']:.2f} to {100 * line['ci_high']:.2f}"
        cells = [line["label"], f"{100 * line['accuracy']:.2f}", interval]
        cells += [line["improved"], line["worsened"]]
        if baseline and line["label"] != baseline and line["p_vs_baseline"] is not None:
            low, high = 100 * line["gain_ci_low"], 100 * line["gain_ci_high"]
            cells += [f"{100 * line['gain_vs_baseline']:+.2f}", f"{low:+.2f} to {high:+.2f}"]
            cells += [f"{line['p_vs_baseline']:.2g}"]
        elif baseline:
            cells += ["" if line["label"] == baseline else "no baseline", "", ""]
        if "reported" in head:
            cells.append("" if line["reported"] is None else line["reported"])
        body.append(cells)
    text = [head, ["---"] * len(head), *body]
    out = ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in text]
    out += ["", "Improved and worsened: images, against the prompt before adaptation."]
    if baseline:
        out[-1] += f" Against {baseline}: paired over the images, in points; p of McNemar's test."
    if failed:
        out += ["", "Failed:", "", *(f"- {row.label}: {row.error}" for row in failed)]
    return "\n".join(out) + "\n"


def save(stem: Path, about: str, rows: Sequence[Row], lines: Sequence[dict], text: str) -> None:
    """Write the table to be committed: with what the numbers depend on, without day and machine.

    The column ``right`` has a bit per image (``numpy.packbits``, hexadecimal), in the order of the
    data set: any two rows can be compared image by image. Raises ``ValueError`` if the rows are not
    over the same images with the same weights.
    """
    import numpy as np

    runs = [row.run for row in rows]
    c = runs[0].config
    differ = [n for n in ONE_TABLE if any(getattr(r.config, n) != getattr(c, n) for r in runs)]
    if differ:
        raise ValueError(f"the rows differ in {', '.join(differ)}: not saved")
    if any(list(r.frame["id"]) != list(runs[0].frame["id"]) for r in runs):
        raise ValueError("images failed in some rows and not in others: not saved")
    known = {
        "model_fingerprint": models.load(c.model, device=c.device).fingerprint,
        "data_fingerprint": datasets.load(c.dataset, n=1, root=c.root or None).fingerprint,
        "seed": c.seed,
        "subset_seed": c.subset_seed,
    }
    kept = []
    for r, line in zip(runs, lines, strict=True):
        line = {k: v for k, v in line.items() if k != "seconds_per_image"} | known
        line["learning_rate"] = r.config.options.get("lr")
        line["selection_p_all"] = r.config.options.get("rho")
        kept.append(line | {"right": np.packbits(metrics.correct(r.frame)).tobytes().hex()})
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_whole(stem.with_name(stem.name + ".csv"), as_csv(kept))
    for name in ("learning_rate", "selection_p_all"):
        values = sorted({line[name] for line in kept} - {None})
        known |= {name: " or ".join(f"{value:g}" for value in values)} if values else {}
    head = f"{lines[0]['model']} on {lines[0]['dataset']}, n = {lines[0]['n']} images per row; "
    head += "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.items())
    parts = [" ".join(about.split()), head + ".", text]
    write_whole(stem.with_name(stem.name + ".md"), "\n\n".join(part for part in parts if part))


def as_csv(lines: Sequence[Mapping]) -> str:
    """The table with every column."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]) if lines else ["label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
