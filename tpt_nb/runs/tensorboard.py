"""TensorBoard events of a run, with the tags of the study \"TPT with patches\"."""

import dataclasses
import json
import math

import numpy as np

from tpt_nb import metrics
from tpt_nb.runs.records import Run


def write_tensorboard(run_: Run, classnames: list[str]) -> None:
    """TensorBoard events of a run, computed from its records, with the study's tags.

    "Base" is before, "TPT_coop" after adaptation, whatever the prompt and the method: these are the
    names in the study's event files, kept so that its dashboards fit. Its KL divergence from the
    one-hot target is the cross-entropy.
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
