"""Write the numbers in the README and in the data cards from the files that measured them.

``python ci/readme.py`` writes each section between its markers (``<!-- name:begin -->`` and
``<!-- name:end -->``), ``--check`` fails if a page is not what it would write. Numbers are never
typed by hand.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
MINICLIP, ICONSHIFT = REPO / "data" / "miniclip", REPO / "data" / "iconshift"
MISSING = "Not measured yet: the file {} is missing."

VARIANTS = {
    "iconshift": "I: as in training",
    "iconshift-v2": "V2: new scenes",
    "iconshift-a": "A: small, in clutter",
    "iconshift-r": "R: unseen styles",
    "iconshift-sketch": "Sketch: black and white",
}
PLAIN = {"single": "one prompt", "ensemble": "7 templates", "coop": "CoOp"}
ADAPTED = {"confident_view": "confident views", "tpt": "TPT", "tpt_coop": "TPT + CoOp"}


def table(evaluation: dict) -> str:
    """The evaluation as a Markdown table: accuracies with intervals, gains of the adapted ones.

    Raises ``KeyError`` naming what the file lacks.
    """
    names = PLAIN | ADAPTED
    lines = [
        "| IconShift variant | n | " + " | ".join(names.values()) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for variant, title in VARIANTS.items():
        row = evaluation[variant]
        cells = [cell(row[name]) for name in names]
        lines.append(f"| {title} | {row['single']['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(entry: dict) -> str:
    """One measurement: "41.2 ± 1.9", and for an adapted one the gain with its interval."""
    low, high = entry["ci95"]
    text = f"{percent(entry['accuracy'])} ± {percent((high - low) / 2)}"
    if "gain" in entry:
        low, high = entry["gain_ci95"]
        text += f"<br>{entry['gain'] * 100:+.1f} [{low * 100:+.1f}, {high * 100:+.1f}]"
    return text


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def training(rows: list[dict]) -> str:
    """What the log of the training says: its last row."""
    last = rows[-1]
    return (
        f"{last['step']:,} steps, {last['seconds'] / 60:.0f} minutes on two CPU cores (bfloat16 "
        "autocast, the cores shared with other work at times). At the end: loss "
        f"{last['loss']:.2f}, logit scale {last['scale']:.1f}; zero-shot "
        f"{percent(last['iconshift-v2'])} % on 400 scenes of `iconshift-v2`, "
        f"{percent(last['iconshift-dev'])} % on 400 of `iconshift-dev`."
    )


def text_training(rows: list[dict]) -> str:
    """What the log of the text tower's training says: every measurement."""
    lines = [
        "| step | shift | V2 | TPT on V2 | dev | TPT on dev |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row['step']:,}", f"{row['shift']:.3f}"]
        for variant in ("iconshift-v2", "iconshift-dev"):
            gain = row[f"{variant}/0.02"]
            cells += [percent(row[variant]), f"{100 * gain:+.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    text = f"{rows[-1]['step']:,} steps, {rows[-1]['seconds'] / 60:.0f} minutes on two CPU cores."
    return "\n".join([text, "", *lines])


def coop(report: dict) -> str:
    """How the CoOp context was trained, from ``coop.json``."""
    tried = "; ".join(
        f"{'the start' if row['lr'] is None else 'rate ' + format(row['lr'], 'g')}: "
        f"{percent(row['iconshift-v2'])} / {percent(row['iconshift-dev'])}"
        for row in report["tried"]
    )
    return (
        f"{report['epochs']} epochs at rate {report['lr']:g}; tried (accuracy in % on "
        f"`iconshift-v2` / `iconshift-dev`): {tried}. {report['seconds']} seconds on two CPU cores."
    )


def rates(config: dict) -> str:
    """The curve over learning rates, from ``config.json``."""
    lines = [
        "| rate | shift | V2, one prompt | V2, CoOp | dev, one prompt | dev, CoOp | mean |",
        "| ---: " * 7 + "|",
    ]
    columns = [f"{v}/{p}" for v in ("iconshift-v2", "iconshift-dev") for p in ("single", "coop")]
    for row in config["curve"]:
        mark = "**" if row["lr"] == config["tpt_lr"] else ""
        gains = [f"{100 * row[key]:+.1f}" for key in (*columns, "mean_gain")]
        cells = [f"{mark}{row['lr']:g}{mark}", f"{row['text_shift']:.3f}", *gains]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\nGains in points of accuracy."


def adversarial(kept: dict) -> str:
    """What the reference classifier of the filter reaches, from ``filter-a.json``."""
    return (
        f"That classifier is right on {percent(kept['reference_accuracy_iconshift_v2'])} % of "
        f"`iconshift-v2` and on {percent(kept['reference_accuracy_candidates'])} % of the "
        f"candidates; {len(kept['kept']):,} images stay."
    )


def leaderboard(table: dict) -> str:
    """The methods under one prompt, best first, and what our own had to show."""
    short = {v: title.split(":")[0] for v, title in VARIANTS.items()}
    rows = [row for row in table["rows"] if row["prompt"] == "single"]
    rows.sort(key=lambda row: (row["online"], -row["mean_shifted"]))
    lines = [
        "| method | " + " | ".join(short[v] for v in table["variants"]) + " | A, R, Sketch "
        "| over zero-shot | ECE | ms |",
        "| --- |" + " ---: |" * (len(table["variants"]) + 4),
    ]
    for row in rows:
        cells = [percent(row["variants"][v]["accuracy"]) for v in table["variants"]]
        cells += [percent(row["mean_shifted"])]
        gain = row["gain_over_zero_shot"]
        cells.append("" if row["row"] == "zero_shot" else interval(gain))
        cells += [f"{100 * row['ece']:.0f}", f"{1000 * row['seconds']:.1f}"]
        name = f"`{row['row']}`" + (" (online)" if row["online"] else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    episodic = {row["row"]: row for row in rows if not row["online"]}
    best = max((r for r in episodic.values() if r["published"]), key=lambda r: r["mean_shifted"])
    gain = table["wins"]["contrast_vote"][best["row"]]
    price = episodic["contrast_vote"]["seconds"] / episodic["vote"]["seconds"]
    n = " or ".join(f"{x:,}" for x in sorted({r["n"] for r in rows[0]["variants"].values()}))
    return "\n".join(lines) + (
        f"\n\n{n} images per variant, {table['seeds']} seed(s) "
        "of the views; intervals of 95 %, paired, over the images of A, R and Sketch; ms per image "
        f"from encoded features. `contrast_vote`, developed here, against the best published "
        f"episodic method on A, R and Sketch (`{best['row']}`): {interval(gain)} points, at "
        f"{price:.2f} times the time of the vote."
        + (f" Not in this table yet: {', '.join(table['absent'])}." if table["absent"] else "")
    )


def interval(gain: list[float]) -> str:
    """(gain, low, high) as points: "+1.2 [+0.3, +2.1]"."""
    value, low, high = (100 * x for x in gain)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def cost(r: dict) -> str:
    """What TPT costs, from the JSON of ``ci/bench/tpt.py``."""
    gigabytes = {k: v / 2**30 for k, v in (r["memory_bytes"] or {}).items() if v}
    lines = [
        f"{r['model']} at full size (random weights: the cost does not depend on them), "
        f"{r['classes']:,} classes, {r['views']} views, float32, "
        + " ".join(filter(None, [r.get("processor"), r["device"]]))
        + f", torch {r['torch'].split('+')[0]}; "
        + ("one run" if r["repeats"] == 1 else f"medians of {r['repeats']} runs")
        + (f", **{r['note']}**" if r.get("note") else "")
        + ":",
        "",
        "| seconds per image | image encoder | views | adaptation | all | of the encoder |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, key in (("as the paper's code does it", "paper_s"), ("here", "fast_s")):
        whole = r["floor_s"] + r["views_s"] + r[key]
        cells = [f"{x:.3g}" for x in (r["floor_s"], r["views_s"], r[key], whole)]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{whole / r['floor_s']:.2f}"]) + " |")
    text = (
        f"Adaptation alone takes {r['ratio_adapt']:.0f} times less, all of it "
        f"{r['ratio_end_to_end']:.1f} times less"
    )
    if r["memory_ratio"]:
        text += (
            f", with {r['memory_ratio']:.2f} of the memory ({gigabytes['fast']:.1f} of "
            f"{gigabytes['paper']:.1f} GB)"
        )
    a = r["agreement"]
    same = a["same_prediction"] and a["same_selection"]
    text += (
        f". Predictions and selected views {'are the same' if same else 'DIFFER'}, logits are "
        f"within {a['largest_logit_difference']:.0e}."
    )
    if "once_s" in r:
        text += f" What belongs to the initial context is made once: {r['once_s']:.1f} s."
    grown = r.get("growth", {}).get("classes", {})
    if grown:
        parts = [f"{row['over_floor']:.2f} with {int(n):,}" for n, row in grown.items()]
        text += f" All of it is this many times the encoder: {', '.join(parts)} classes."
    return "\n".join([*lines, "", text])


SHOWN = (  # rows of the study, by label: a start, the original, and one of each kind
    "CoOp prompt", "TPT", "TPT with AugMix", "patches 4x4: TPT", "patches 4x4, overlap 0.6: TPT",
    "patches 4x4: patch_loss1", "hard5", "soft", "hard1", "patches 4x4, overlap 0.6: hard1",
)  # fmt: skip


def study(rows: list[dict]) -> str:
    """Some rows of the study, measured here and as reported, and how well all of them agree."""
    from scipy.stats import spearmanr

    measured, reported = ([float(row[k]) for row in rows] for k in ("accuracy", "reported"))
    rank = spearmanr(measured, reported).statistic
    lines = [
        "| row | IconShift-A, MiniCLIP | over TPT | REPORTED: ImageNet-A, RN50 |",
        "| --- | ---: | ---: | ---: |",
    ]
    by_label = {row["label"]: row for row in rows}
    for label in SHOWN:
        row = by_label[label]
        gain, low, high = (
            100 * float(row[k]) for k in ("gain_vs_baseline", "gain_ci_low", "gain_ci_high")
        )
        over = "" if label == "TPT" else f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]"
        there = f"{float(row['reported']):.1f}"
        lines.append(f"| {label} | {percent(float(row['accuracy']))} | {over} | {there} |")
    text = (
        f"{rows[0]['n']} images per row, one seed; gains in points, paired, with 95 % intervals. "
        f"Over all {len(rows)} rows the rank correlation of the two columns is {rank:.2f}."
    )
    return "\n".join([*lines, "", text])


EVALUATION = MINICLIP / "evaluation.json"
STUDY = REPO / "notebooks" / "results" / "study_500.csv"
SECTIONS = [  # page, name of the section, file of the numbers, how to say them
    (REPO / "README.md", "results", EVALUATION, table),
    (REPO / "README.md", "study", STUDY, study),
    (REPO / "README.md", "leaderboard", REPO / "data" / "leaderboard.json", leaderboard),
    (REPO / "README.md", "cost", REPO / "data" / "bench_rn50.json", cost),
    (MINICLIP / "README.md", "results", EVALUATION, table),
    (MINICLIP / "README.md", "training", MINICLIP / "training.jsonl", training),
    (MINICLIP / "README.md", "text", MINICLIP / "training-text.jsonl", text_training),
    (MINICLIP / "README.md", "coop", MINICLIP / "coop.json", coop),
    (MINICLIP / "README.md", "rate", MINICLIP / "config.json", rates),
    (ICONSHIFT / "README.md", "filter", ICONSHIFT / "filter-a.json", adversarial),
]


def read(path: Path):
    """A JSON file, or the rows of a JSON-lines or CSV file; None if there is no such file."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def rendered(text: str, name: str, body: str) -> str:
    """The page with ``body`` in the section; ``ValueError`` unless it has the section once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must hold {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def pages() -> dict[Path, str]:
    """Each page as it should be."""
    out = {}
    for page, name, source, say in SECTIONS:
        text = out.get(page) or page.read_text(encoding="utf-8")
        numbers = read(source)
        body = MISSING.format(source.name) if numbers is None else say(numbers)
        try:
            out[page] = rendered(text, name, body)
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from None
    return out


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the numbers in README and data cards.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if one differs")
    check, bad = parser.parse_args().check, 0
    for page, new in pages().items():
        name = page.relative_to(REPO)
        if new == page.read_text(encoding="utf-8"):
            print(f"{name}: the numbers are those of the measurements")
        elif check:
            print(f"{name}: the numbers are not those of the measurements; run python ci/readme.py")
            bad = 1
        else:
            page.write_text(new, encoding="utf-8")
            print(f"{name}: numbers written")
    return bad


if __name__ == "__main__":
    sys.exit(main())
