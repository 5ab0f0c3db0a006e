"""Run a grid of configurations and put the results into one table.

    python ci/sweep.py GRID.yaml [--out DIR] [--jobs N] [--json] [--save STEM] [--OPTION VALUE ...]

A grid is a YAML file: ``rows``, a list of mappings from the options of ``python -m tpt_nb
evaluate`` to values (a list of values stands for one row each; two lists for all pairs),
``common``, options that all rows share, and ``baseline``, the label of the row with which the
others are compared image by image. A row may carry a ``label``, and numbers under ``reported``
that go into the table as they are; ``about`` says what the grid is and who reported them. Options
on the command line override the file.

Each row is a run in a process of its own, so that a crash ends one row. It is forked from one that
has imported torch and, on the CPU, made what rows with the same prompts share. A run that is
finished is loaded, a killed one goes on. Rows with the same images, model and augmenter share their
features through the cache: the first of them encodes, the others wait for it. Rows that fail are
listed at the end; the exit code is then 1.

``--cluster local|ADDRESS`` does the rows with Ray instead (``tpt_nb.cluster``): first all features,
shard by shard, then a task per row.

``DIR`` (runs/<name of the grid> by default) gets the runs, a log per row, ``table.csv`` and
``table.md``. ``--save STEM`` writes a table to be committed too, ``STEM.csv`` and ``STEM.md``: what
was measured on which images with which weights, and nothing that depends on the day or the machine
(no seconds). It is not written if a row failed.
"""

import argparse
import csv
import dataclasses
import io
import itertools
import json
import multiprocessing.connection
import multiprocessing.forkserver
import os
import sys
import threading
import time
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

REPO = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, REPO)

from tpt_nb.__main__ import Parser, _reader, add_cluster_options  # noqa: E402
from tpt_nb.core.messages import unknown
from tpt_nb.runs import RunConfig, load_run, resolve, run_name  # noqa: E402

FIELDS = [field.name for field in dataclasses.fields(RunConfig)]
PRELOAD = ["torch", "open_clip", "pandas", "scipy.stats", "tpt_nb.experiment", "tpt_nb.encode",
           "tpt_nb.adapt", "tpt_nb.datasets"]  # fmt: skip
# what features depend on: rows that agree in these do not encode twice
SHARED = ("dataset", "root", "model", "device", "seed", "reduced_size", "subset_seed", "cache")


@dataclasses.dataclass
class Row:
    """One row of the table: a configuration, or why there is none."""

    label: str
    values: dict
    reported: object = None
    config: RunConfig | None = None
    features: str = ""
    folder: Path | None = None
    log: Path | None = None
    error: str = ""
    seconds: float = 0.0


# --- the grid ------------------------------------------------------------------------------------


def read_grid(path: Path, overrides: Mapping) -> tuple[str, list[Row], str]:
    """Label of the baseline row ("" for none), the rows of a grid file, and what it is about.

    Raises ``ValueError`` if the file is no grid. A row whose options are wrong is a failed row.
    """
    import yaml

    try:
        grid = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(grid, dict) or not isinstance(grid.get("rows"), list) or not grid["rows"]:
        raise ValueError(f"{path}: expected a mapping with a list of rows")
    for key in grid:
        if key not in ("rows", "common", "baseline", "about"):
            raise ValueError(
                f"{path}: {unknown('key', key, ['rows', 'common', 'baseline', 'about'])}"
            )
    rows = []
    for number, entry in enumerate(grid["rows"], start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: row {number} is {entry!r}; expected a mapping of options")
        rows += expand({**grid.get("common", {}), **entry, **overrides})
    labels = [row.label for row in rows]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{path}: two rows are called {twice[0]!r}; give them a label")
    baseline = grid.get("baseline", "")
    if baseline and baseline not in labels:
        raise ValueError(f"{path}: {unknown('baseline', baseline, labels)}")
    return baseline, rows, str(grid.get("about", ""))


def expand(entry: Mapping) -> list[Row]:
    """The rows of one entry: a list of values stands for one row each."""
    values = {key: value for key, value in entry.items() if key not in ("label", "reported")}
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    rows = []
    for chosen in itertools.product(*lists.values()):
        own = dict(zip(lists, chosen, strict=True))
        parts = [str(entry["label"])] if entry.get("label") else []
        parts += [f"{key}={value}" for key, value in own.items()]
        label = " ".join(parts) or " ".join(f"{k}={v}" for k, v in values.items())
        rows.append(Row(label, {**values, **own}, entry.get("reported")))
    return rows


def prepare(rows: Sequence[Row], out: Path) -> None:
    """Fill in the configurations, in place; a row that has none keeps the reason."""
    from tpt_nb.views import AUGMENTERS

    for row in rows:
        try:
            config = resolve(RunConfig.from_dict({**row.values, "out": str(out)}))[0]
            row.config, row.folder = config, out / run_name(config)
        except (ValueError, OSError) as error:
            row.error = " ".join(str(error).split())
            continue
        takes = AUGMENTERS[config.augmenter].__dataclass_fields__
        names = [*SHARED, "augmenter", *(name for name in takes if name in FIELDS)]
        row.features = json.dumps([[name, getattr(config, name)] for name in names])


# --- running -------------------------------------------------------------------------------------


def start_server(rows: Sequence[Row], out: Path) -> None:
    """Start the process that rows are forked from.

    While this one reads the grid it imports, and makes what the rows share (``sweep_warm.py``).
    """
    paths = [REPO, str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # to count GPUs must not initialise CUDA: a forked process could not use it then
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ["TPT_NB_SWEEP"] = json.dumps([{**row.values, "out": str(out)} for row in rows])
    if os.name == "posix":
        multiprocessing.set_forkserver_preload([*PRELOAD, "sweep_warm"])
        multiprocessing.forkserver.ensure_running()


def default_jobs() -> int:
    """A row per core; one at a time on a GPU, which a single run keeps busy."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def child(values: dict, log: Path, label: str, threads: int) -> None:
    """One run, in a process of its own; what it prints goes to the log."""
    # a sweep that is killed must not leave a run behind that the next sweep would meet
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(label, flush=True)
    import torch

    from tpt_nb.runs import run

    torch.set_num_threads(threads)
    try:
        run(RunConfig(**values))
    except (ValueError, OSError) as error:
        print(f"\n{' '.join(str(error).split())}", flush=True)
        raise SystemExit(2) from None


def run_rows(rows: Sequence[Row], out: Path, jobs: int) -> None:
    """Run the rows, `jobs` at a time; fills in their seconds and errors."""
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    waiting = [row for row in rows if row.config]
    running: dict[multiprocessing.Process, Row] = {}
    encoded: set[str] = set()
    done = 0

    def report(row: Row, text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{len(rows)}] {row.label}: {text}", flush=True)

    for row in rows:
        if not row.config:
            report(row, f"failed, {row.error}")
    try:
        while waiting or running:
            while len(running) < jobs and (row := startable(waiting, running.values(), encoded)):
                waiting.remove(row)
                row.log = out / "logs" / f"{rows.index(row) + 1:02d}.log"
                arguments = (dataclasses.asdict(row.config), row.log, row.label, threads)
                process = context.Process(target=child, args=arguments)
                process.start()
                running[process], row.seconds = row, time.perf_counter()
            multiprocessing.connection.wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                process.join()
                row = running.pop(process)
                row.seconds = time.perf_counter() - row.seconds
                if process.exitcode:
                    row.error = why(row.log, process.exitcode)
                    report(row, f"failed, {row.error} (all of it: {row.log})")
                else:
                    encoded.add(row.features)
                    report(row, f"{row.seconds:.1f} s")
    finally:
        for process in running:
            process.terminate()
            process.join()


def run_on_cluster(rows: Sequence[Row], out: Path, address: str, workers: int | None) -> None:
    """Run the rows as tasks of a cluster; fills in their configurations, folders and errors.

    Raises ``ValueError`` if there is no cluster or no Ray, ``OSError`` if the disk is full.
    """
    from tpt_nb.scale import cluster

    configs: dict[int, RunConfig] = {}
    for number, row in enumerate(rows):
        try:
            configs[number] = RunConfig.from_dict({**row.values, "out": str(out)})
        except ValueError as error:
            row.error = str(error)
            print(f"{row.label}: failed, {row.error}", flush=True)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    numbers, report = list(configs), cluster.Report()
    with cluster.connect(address, workers) as nodes:
        for k, done in cluster.run_all(nodes, list(configs.values()), report):
            row = rows[numbers[k]]
            row.log = out / "logs" / f"{numbers[k] + 1:02d}.log"
            if isinstance(done, Exception):
                row.error = " ".join(str(done).split())
                row.log.write_text(f"{row.label}\n{row.error}\n")
                print(f"{row.label}: failed, {row.error}", flush=True)
                continue
            row.config, row.folder = done.config, Path(done.dir)
            row.seconds = done.summary["seconds"]["total"]
            row.log.write_text(f"{row.label}\n{done.said}")
            print(f"{row.label}: {row.seconds:.1f} s", flush=True)
    print(report.text(), flush=True)


def startable(waiting: Sequence[Row], running: Iterable[Row], encoded: set[str]) -> Row | None:
    """The first row whose features nobody is encoding and whose folder nobody is writing to.

    Rows that start new features go first, so that the processes encode different ones.
    """
    busy = {row.features for row in running} - encoded
    folders = {row.folder for row in running}
    free = [row for row in waiting if row.features not in busy and row.folder not in folders]
    return next((row for row in free if row.features not in encoded), next(iter(free), None))


def why(log: Path, code: int) -> str:
    """Why a process ended badly, in a line."""
    if code < 0:
        return f"killed by signal {-code}"
    return log.read_text(errors="replace").strip().splitlines()[-1]


# --- the table -----------------------------------------------------------------------------------


def table(rows: Sequence[Row], baseline: str) -> list[dict]:
    """One dict per finished row: what ran, accuracy with its interval, changes, and against the
    baseline the paired gain with its interval and McNemar's p-value."""
    from tpt_nb.metrics import compare

    runs = {row.label: load_run(row.folder) for row in rows if row.folder and not row.error}
    reference = runs.get(baseline)
    out = []
    for row in rows:
        if row.label not in runs:
            continue
        done, c = runs[row.label], row.config
        s = done.summary
        line = {
            "label": row.label,
            "method": c.method,
            "augmenter": c.augmenter,
            "loss": c.loss if c.method == "tpt" else "",
            "n_aug": c.n_aug,
            "n_patches": c.n_patches,
            "overlap": c.overlap,
            "augmix": c.augmix,
            "dataset": s["dataset"],
            "model": Path(c.model).stem if Path(c.model).is_file() else c.model,
            "n": s["n"],
            "failed_images": s["failed"]["count"],
            "accuracy": s["accuracy_after"],
            "ci_low": s["accuracy_after_ci95"][0],
            "ci_high": s["accuracy_after_ci95"][1],
            "prompt_accuracy": s["accuracy_before"],
            "improved": s["improved"],
            "worsened": s["worsened"],
        }
        # the table has no bootstrap interval, so none is drawn
        paired = compare(reference.records, done.records, resamples=1) if reference else None
        for name, key in (("gain", "gain"), ("p", "p_value")):
            line[f"{name}_vs_baseline"] = paired[key] if paired else None
        line["gain_ci_low"], line["gain_ci_high"] = paired["gain_ci95"] if paired else (None, None)
        for name in ("improved", "worsened"):
            line[f"{name}_vs_baseline"] = paired[name] if paired else None
        line["reported"] = row.reported
        line["seconds_per_image"] = s["seconds_per_image"]
        line["run"] = done.name
        out.append(line)
    return out


def markdown(lines: Sequence[Mapping], baseline: str, failed: Sequence[Row]) -> str:
    """The table for people, accuracies in per cent; failures below it."""
    head = ["row", "accuracy %", "95 % interval", "improved", "worsened"]
    head += [f"against {baseline}", "95 % interval", "p"] if baseline else []
    head += ["reported"] if any(line["reported"] is not None for line in lines) else []
    body = []
    for line in lines:
        cells = [
            line["label"],
            f"{100 * line['accuracy']:.2f}",
            f"{100 * line['ci_low']:.2f} to {100 * line['ci_high']:.2f}",
            line["improved"],
            line["worsened"],
        ]
        if baseline and line["label"] == baseline:
            cells += ["", "", ""]
        elif baseline and line["p_vs_baseline"] is not None:
            low, high = 100 * line["gain_ci_low"], 100 * line["gain_ci_high"]
            cells += [f"{100 * line['gain_vs_baseline']:+.2f}", f"{low:+.2f} to {high:+.2f}"]
            cells += [f"{line['p_vs_baseline']:.2g}"]
        elif baseline:
            cells += ["no baseline", "", ""]
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


def save(stem: Path, about: str, rows: Sequence[Row], lines: Sequence[Mapping], text: str) -> None:
    """Write the table to be committed: with what the numbers depend on, without day and machine.

    The column ``right`` has a bit per image (``numpy.packbits``, hexadecimal), in the order of the
    data set: any two rows can be compared image by image.

    Raises ``ValueError`` if the rows are not over the same images with the same weights.
    """
    import numpy as np

    from tpt_nb import datasets, models
    from tpt_nb.metrics import correct

    configs = {row.label: row.config for row in rows}
    facts, first = [], []
    for line in lines:
        c = configs[line["label"]]
        facts.append(tuple(getattr(c, name) for name in (*SHARED, "learning_rate")))
    if len(set(facts)) > 1:
        raise ValueError("the rows differ in images, model, seed or learning rate: not saved")
    images = datasets.load(c.dataset, n=1, root=c.root or None)
    known = {
        "model_fingerprint": models.load(c.model, device=c.device).fingerprint,
        "data_fingerprint": images.fingerprint,
        "seed": c.seed,
        "subset_seed": c.subset_seed,
        "learning_rate": c.learning_rate,
        "selection_p_all": c.selection_p_all,
    }
    kept = []
    for line in lines:
        frame = load_run(next(row.folder for row in rows if row.label == line["label"])).frame
        ids = list(frame["id"])
        if ids != (first := first or ids):
            raise ValueError("images failed in some rows and not in others: not saved")
        line = {k: v for k, v in line.items() if k != "seconds_per_image"} | known
        kept.append(line | {"right": np.packbits(correct(frame)).tobytes().hex()})
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_csv(stem.with_name(stem.name + ".csv"), kept)
    head = f"{lines[0]['model']} on {lines[0]['dataset']}, n = {lines[0]['n']} images per row; "
    head += "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.items())
    parts = [" ".join(about.split()), head + ".", text]
    write(stem.with_name(stem.name + ".md"), "\n\n".join(part for part in parts if part))


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_csv(path: Path, lines: Sequence[Mapping]) -> None:
    """The table with every column."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]) if lines else ["label"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write(path, file.getvalue())


# --- the command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options of the sweep, and those of a run, without defaults."""
    main_parser = Parser(prog="python ci/sweep.py", description=__doc__.split("\n")[0],
                         allow_abbrev=False)  # fmt: skip
    main_parser.add_argument("grid", type=Path, metavar="GRID.yaml")
    main_parser.add_argument("--jobs", type=int, help="rows at a time; default: cores, 1 on CUDA")
    main_parser.add_argument("--json", action="store_true", help="end with one JSON object")
    add_cluster_options(main_parser)
    main_parser.add_argument("--save", type=Path, metavar="STEM", help="STEM.csv and STEM.md too")
    hints = typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        names = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        kind = {"type": _reader(hints[field.name]), "metavar": "X"}
        if hints[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = "folder of the sweep" if field.name == "out" else "overrides the grid's"
        main_parser.add_argument(*names, help=text, default=argparse.SUPPRESS, **kind)
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    args = vars(parser().parse_args(argv))
    path, jobs, as_json, stem = (args.pop(name) for name in ("grid", "jobs", "json", "save"))
    address, workers = args.pop("cluster"), args.pop("cluster_workers")
    out = args.pop("out", Path("runs") / path.stem)
    began = time.perf_counter()
    try:
        if "://" in str(out):
            raise ValueError("out must be a folder here, for the table; cache may be an address")
        out = Path(out)
        baseline, rows, about = read_grid(path, args)
    except (ValueError, OSError) as error:
        print(f"python ci/sweep.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        if address:
            run_on_cluster(rows, out, address, workers)
        else:
            start_server(rows, out)
            prepare(rows, out)
            run_rows(rows, out, max(1, jobs or default_jobs()))
    except (ValueError, OSError) as error:
        if not address:
            raise
        print(f"python ci/sweep.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    lines, failed = table(rows, baseline), [row for row in rows if row.error]
    text = markdown(lines, baseline, failed)
    write_csv(out / "table.csv", lines)
    write(out / "table.md", text)
    if stem and failed:
        print(f"{stem} is left as it was: rows failed", file=sys.stderr)
    elif stem:
        try:
            save(stem, about, rows, lines, text)
        except ValueError as error:
            print(f"python ci/sweep.py: {error}", file=sys.stderr)
            return 2
    seconds = time.perf_counter() - began
    print(f"\n{text}\n{len(lines)} rows, {len(failed)} failed, {seconds:.0f} s -> {out}/table.csv")
    if as_json:
        failures = [{"label": row.label, "error": row.error} for row in failed]
        print(json.dumps({"grid": path.stem, "baseline": baseline, "rows": lines,
                          "failed": failures, "seconds": round(seconds, 1)}))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
