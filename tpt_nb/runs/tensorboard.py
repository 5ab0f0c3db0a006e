"""TensorBoard events of a run, with the tags of the study \"TPT with patches\", and what they say.

"Base" is before, "TPT_coop" after adaptation, whatever the prompt and the method: these are the
names in the study's event files, kept so that its dashboards fit.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from tpt_nb import metrics
from tpt_nb.datasets import Dataset
from tpt_nb.runs.records import Run

SHOWN, SIDE = 12, 96  # pictures of each kind in the events, their pixels
TAGS = {  # what the tags mean; a tag belongs to the longest beginning here
    "Config": "text: every setting of the run",
    "Loss/value": "per image: the loss at the start prompt",
    "confidence/": "per image: the largest probability, before (Base), after, and after - before",
    "crossEntropy/": "per image: -log of the probability of the true class; difference: what was "
    "gained; Final: the sum over the images",
    "KL/": "per image: the divergence from the one-hot target, which is the cross-entropy again",
    "AccuracyTOP1/": "running: the share of the images so far that are right; Final: of all",
    "AccuracyTOP5/": "running: the share whose class is among the five most probable",
    "Samples/TPTchange": "per image: 1 it turned right, -1 it turned wrong, 0 neither",
    "Samples/TPTcumulative_changed": "running: improved minus worsened so far",
    "Samples-Global/": "over all: how many images improved and worsened, and their shares",
    "Samples-PerClass/Changed": "step = class number: improved minus worsened of the class",
    "Samples-PerClass-info/": "step = class number: images, improved and worsened of the class",
    "Samples-Ids/": "text: the ids of the improved and of the worsened images, class by class",
    "Images/": "the first improved and worsened images; the step is their place in the run",
    "statistics/": "text: the counts of each class, and of all, as JSON",
}


def meaning(tag: str) -> str:
    """What a tag means, by :data:`TAGS`; ``KeyError`` if nothing there says so."""
    return TAGS[max((start for start in TAGS if tag.startswith(start)), key=len)]


def read_scalars(folder: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """The curves of a run's events: tag -> steps and values. ``ValueError`` if there are none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if not tags:
        raise ValueError(f"{folder} has no events: run it with tensorboard=True.")
    points = {tag: events.Scalars(tag) for tag in tags}
    return {tag: ([p.step for p in some], [p.value for p in some]) for tag, some in points.items()}


def write_tensorboard(run_: Run, classnames: list[str], dataset: Dataset | None = None) -> None:
    """TensorBoard events of a run, computed from its records, with the study's tags.

    With the data set also pictures of the first images that improved and worsened.
    """
    from torch.utils.tensorboard import SummaryWriter

    for old in run_.dir.glob("events.out.tfevents.*"):  # of a run that was killed
        old.unlink()
    table = run_.frame
    n = len(table)
    curves, final = _curves(table)
    classes = metrics.per_class(table, classnames)
    info = "Samples-PerClass-info"
    by_class = {
        f"{info}/Nsamples": classes["n"],
        f"{info}/NImproved": classes["improved"],
        f"{info}/NWorsened": classes["worsened"],
        f"{info}/ImprovedRatio": classes["improved"] / classes["n"],
        f"{info}/WorsenedRatio": classes["worsened"] / classes["n"],
        "Samples-PerClass/Changed": classes["improved"] - classes["worsened"],
    }
    changes = metrics.changes(table)
    for name in ("Improved", "Worsened"):
        final[f"Samples-Global/N{name}"] = changes[name.lower()]
        final[f"Samples-Global/{name}Ratio"] = changes[name.lower()] / n
    steps = {tag: enumerate(values) for tag, values in curves.items()}
    steps |= {tag: values.items() for tag, values in by_class.items()}
    steps |= {tag: [(0, value)] for tag, value in final.items()}
    with SummaryWriter(log_dir=str(run_.dir)) as writer:
        writer.add_text("Config", json.dumps(dataclasses.asdict(run_.config), indent=4))
        for tag, points in steps.items():
            for step, value in points:
                if value is not None and math.isfinite(value):
                    writer.add_scalar(tag, value, step)
        writer.add_text("statistics/perclass", classes.to_json(orient="records", indent=4))
        writer.add_text("statistics/global", json.dumps({**changes, "n_samples": n}, indent=4))
        for name, rows in _changed(table).items():
            by_class_ids = rows.groupby("target")["id"].apply(list)
            ids = {f"{c} {classnames[c]}": some for c, some in by_class_ids.items()}
            writer.add_text(f"Samples-Ids/{name}", json.dumps(ids, indent=4))
            for place, picture in _pictures(rows, dataset) if dataset else ():
                writer.add_image(f"Images/{name}", picture, place, dataformats="HWC")


def _changed(table) -> dict:
    """Rows of the images that adaptation turned right, and wrong."""
    before, after = (metrics.correct(table, when) for when in metrics.WHEN)
    return {"Improved": table[~before & after], "Worsened": table[before & ~after]}


def _pictures(rows, dataset: Dataset):
    """(place in the run, pixels) of the first images among these rows; what cannot be read is
    passed over."""
    place = {image_id: i for i, image_id in enumerate(dataset.ids)}
    for at, image_id in list(zip(rows.index, rows["id"], strict=True))[:SHOWN]:
        try:
            image = dataset[place[image_id]][0]
        except (OSError, ValueError, KeyError):  # embeddings of others have no pictures
            continue
        yield int(at), np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.BICUBIC))


def _curves(table) -> tuple[dict, dict]:
    """Of a table of records: tag -> a value per image, and tag -> the value over all of them."""
    count = np.arange(1, len(table) + 1)
    before, after = metrics.WHEN
    right = {when: metrics.correct(table, when).astype(int) for when in metrics.WHEN}
    ce = {w: -np.log(np.maximum(table[f"prob_target_{w}"], 1e-45)) for w in metrics.WHEN}
    curves = {
        "Loss/value": table["loss"],
        "confidence/Base": table["conf_before"],
        "confidence/TPT_coop": table["conf_after"],
        "confidence/difference(TPT-base)": table["conf_after"] - table["conf_before"],
        "crossEntropy/Base": ce[before],
        "crossEntropy/TPT_coop": ce[after],
        "crossEntropy/difference(base-TPT)": ce[before] - ce[after],
        "KL/Base_vs_True": ce[before],
        "KL/TPT_vs_True": ce[after],
        "KL/Base-TPT": ce[before] - ce[after],
        "Samples/TPTchange": right[after] - right[before],
        "Samples/TPTcumulative_changed": (right[after] - right[before]).cumsum(),
    }
    final = {"crossEntropy/Final_Base": ce[before].sum()}
    final["crossEntropy/Final_TPT_coop"] = ce[after].sum()
    for tag, end, hits in (
        ("AccuracyTOP1", "", right),
        ("AccuracyTOP5", "_Top5", {w: table[f"top5_{w}"].to_numpy(int) for w in metrics.WHEN}),
    ):
        base, tpt = (hits[when].cumsum() / count for when in metrics.WHEN)
        curves[f"{tag}/Base{end}"], curves[f"{tag}/TPT_coop{end}"] = base, tpt
        curves[f"{tag}/difference{end}(TPT-base)"] = tpt - base
        final[f"{tag}/Final_Base{end}"], final[f"{tag}/Final_TPT_coop{end}"] = base[-1], tpt[-1]
    return curves, final
