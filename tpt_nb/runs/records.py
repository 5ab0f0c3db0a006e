"""Records of a run: one line per image, written group by group, read back, resumed.

A run that was killed goes on where it stopped, and leaves the records of an undisturbed run: images
are adapted in fixed groups, whatever was finished before, so that every number comes from the same
operations in the same order.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tpt_nb import methods, metrics
from tpt_nb.runs.config import RunConfig

AT_ONCE = 1024  # images whose logits are turned into records together: that takes them in float64


@dataclass
class Run:
    """A finished run: its folder, its configuration (all filled in), its records, its summary."""

    dir: Path
    config: RunConfig
    records: list[dict]
    summary: dict

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def frame(self):
        """The records as a ``pandas.DataFrame``."""
        return metrics.frame(self.records)


def to_records(ids: list[str], targets, adapted) -> list[dict]:
    """Records of a batch of adapted images, as they are written.

    Probabilities are computed in float64 from the logits; values are rounded to 6 decimals, the
    probability of the true class (whose logarithm is used) to 6 significant digits.
    """
    records = []
    for i in range(0, len(ids), AT_ONCE):
        part = slice(i, i + AT_ONCE)
        loss = None if adapted.loss is None else adapted.loss[part]
        logits, before = adapted.logits[part], adapted.logits_before[part]
        some = methods.Adapted(logits, before, loss, adapted.selected[part])
        records += _to_records(ids[part], targets[part], some)
    return records


def _to_records(ids: list[str], targets, adapted) -> list[dict]:
    columns: dict[str, list] = {"id": list(ids), "target": [int(t) for t in targets]}
    target = targets.long().cpu()[:, None]
    for when, logits in (("before", adapted.logits_before), ("after", adapted.logits)):
        log_p = logits.detach().double().cpu().log_softmax(-1)
        p = log_p.exp()
        order = log_p.argsort(dim=-1, descending=True, stable=True)
        columns[f"pred_{when}"] = order[:, 0].tolist()
        columns[f"top5_{when}"] = (order[:, :5] == target).any(-1).tolist()
        columns[f"conf_{when}"] = _round(p.amax(-1))
        columns[f"entropy_{when}"] = _round(-(p * log_p.clamp_min(-1e30)).sum(-1))
        columns[f"prob_target_{when}"] = [
            float(f"{x:.6g}") for x in p.gather(1, target)[:, 0].tolist()
        ]
    loss = adapted.loss
    columns["loss"] = [None] * len(ids) if loss is None else _round(loss.detach().double().cpu())
    columns["selected"] = [row.nonzero()[:, 0].tolist() for row in adapted.selected.cpu()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _round(values) -> list[float | None]:
    # + 0.0 turns -0.0 into 0.0; JSON has no NaN
    return [round(x, 6) + 0.0 if math.isfinite(x) else None for x in values.tolist()]


def append(path: Path, records: list[dict]) -> None:
    """Add a line per record, and close the file: Google Drive uploads none that is open."""
    with open(path, "ab") as file:
        file.write(b"".join(line_of(record) for record in records))


def line_of(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"


def check_folder(folder: Path, header: dict) -> None:
    """Raise ``ValueError`` if the folder holds something other than this run."""
    path = folder / "config.json"
    if not path.exists():
        if (folder / "records.jsonl").exists():
            raise ValueError(f"{folder} has records but no config.json; delete that folder.")
        return
    try:
        old = json.loads(path.read_text())
        theirs = {**old["identity"], **old["dataset"]}
    except (ValueError, KeyError):
        theirs = {}
    mine = {**header["identity"], **header["dataset"]}
    differ = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
    if differ:
        raise ValueError(
            f"{folder} holds a run of another configuration or of other data (differs in "
            f"{', '.join(differ)}); delete that folder, or give another out or run_name."
        )


def finished(folder: Path, config: RunConfig) -> Run | None:
    """The run in the folder if it is complete."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text())
    records, whole = whole_lines(folder / "records.jsonl")
    if len(records) != summary["n"] or not whole:
        return None
    return Run(folder, config, records, summary)


def load_run(path: str | Path) -> Run:
    """Read a run folder as it is, finished or not (then the summary is of what is there).

    Raises ``ValueError`` if it is no run folder or has no records.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run: there is no {folder / 'config.json'}.")
    header = json.loads((folder / "config.json").read_text())
    config = RunConfig.from_dict(header["config"])
    run_ = finished(folder, config)
    if run_ is None:
        records, _ = whole_lines(folder / "records.jsonl")
        if not records:
            raise ValueError(f"{folder} has no records yet: start the run again to go on with it.")
        run_ = Run(folder, config, records, metrics.summarize(records))
    return run_


def whole_lines(path: Path) -> tuple[list[dict], bool]:
    """The records up to the first line that is torn or damaged, and whether that is all."""
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            return records, False
        if not isinstance(record, dict):
            return records, False
        records.append(record)
    return records, not rest


def resume(path: Path, ids: list[str]) -> list[dict]:
    """The records that are there, in the order of ``ids``; what comes after them is cut off.

    A kill can leave half a line at the end; an image that failed and is readable now moves the ones
    behind it.
    """
    records, whole = whole_lines(path)
    good = 0
    while good < min(len(records), len(ids)) and records[good].get("id") == ids[good]:
        good += 1
    if good < len(records):
        print(f"{path}: {len(records) - good} records of other images are cut off")
    if good < len(records) or not whole:
        lines = path.read_bytes().split(b"\n")[:good]
        os.truncate(path, sum(len(line) + 1 for line in lines))
    return records[:good]


def report_failed(summary: Mapping) -> None:
    failed = summary["failed"]
    if not failed["count"]:
        return
    print(f"{failed['count']} of {failed['count'] + summary['n']} images could not be read:")
    for image in failed["images"][:5]:
        print(f"  {image.get('path') or image['id']}: {image['error']}")
    if failed["count"] > 5:
        print(f"  ... all of them are in {summary['name']}/summary.json")


def hint_at_chance(summary: Mapping, classes: int) -> None:
    """A model that guesses is right once in C; one whose labels are mixed up looks the same."""
    n = summary["n"]
    if n < 200 or classes < 2:
        return
    hits, p = round(summary["accuracy_before"] * n), 1 / classes
    fewer = sum(  # the chance of fewer hits: a sum here, as importing scipy takes a second
        math.exp(
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            + k * math.log(p) + (n - k) * math.log1p(-p)
        )
        for k in range(hits)
    )  # fmt: skip
    if 1 - fewer > 0.01:  # guessing gives as many often enough
        print(
            f"hint: zero-shot is right on {hits} of {n} images, as guessing among {classes} "
            "classes would be. Check the label map: does each class folder stand for the class "
            "name of its label, in this order? And are the model's weights trained ones?"
        )
