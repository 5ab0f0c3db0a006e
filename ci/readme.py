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


def markdown(head: str, lines: list[list[str]], first: str = "---") -> str:
    """A table of numbers, but for the first column; ``head`` is its columns with | between."""
    names = head.split(" | ")
    rows = [names, [first, *["---:"] * (len(names) - 1)], *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def gained(gain) -> str:
    """(gain, low, high) as points: "+1.2 [+0.3, +2.1]"."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * float(x) for x in gain))


def table(evaluation: dict) -> str:
    """The evaluation: accuracies with intervals, gains of the adapted ones.

    Raises ``KeyError`` naming what the file lacks.
    """
    names = PLAIN | ADAPTED
    lines = []
    for variant, title in VARIANTS.items():
        row = evaluation[variant]
        lines.append([title, str(row["single"]["n"]), *(cell(row[name]) for name in names)])
    return markdown(" | ".join(["IconShift variant", "n", *names.values()]), lines)


def cell(entry: dict) -> str:
    """One measurement: "41.2 ± 1.9", and for an adapted one the gain with its interval."""
    low, high = entry["ci95"]
    text = f"{percent(entry['accuracy'])} ± {percent((high - low) / 2)}"
    return text + (f"<br>{gained((entry['gain'], *entry['gain_ci95']))}" if "gain" in entry else "")


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
    lines = []
    for row in rows:
        line = [f"{row['step']:,}", f"{row['shift']:.3f}"]
        for variant in ("iconshift-v2", "iconshift-dev"):
            line += [percent(row[variant]), f"{100 * row[f'{variant}/0.02']:+.1f}"]
        lines.append(line)
    text = f"{rows[-1]['step']:,} steps, {rows[-1]['seconds'] / 60:.0f} minutes on two CPU cores."
    head = "step | shift | V2 | TPT on V2 | dev | TPT on dev"
    return f"{text}\n\n{markdown(head, lines, '---:')}"


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
    keys = [f"{v}/{p}" for v in ("iconshift-v2", "iconshift-dev") for p in ("single", "coop")]
    lines = []
    for row in config["curve"]:
        mark = "**" if row["lr"] == config["tpt_lr"] else ""
        gains = [f"{100 * row[key]:+.1f}" for key in (*keys, "mean_gain")]
        lines.append([f"{mark}{row['lr']:g}{mark}", f"{row['text_shift']:.3f}", *gains])
    head = "rate | shift | V2, one prompt | V2, CoOp | dev, one prompt | dev, CoOp | mean"
    return markdown(head, lines, "---:") + "\n\nGains in points of accuracy."


def adversarial(kept: dict) -> str:
    """What the reference classifier of the filter reaches, from ``filter-a.json``."""
    return (
        f"That classifier is right on {percent(kept['reference_accuracy_iconshift_v2'])} % of "
        f"`iconshift-v2` and on {percent(kept['reference_accuracy_candidates'])} % of the "
        f"candidates; {len(kept['kept']):,} images stay."
    )


KINDS = {
    "episodic": "One image at a time",
    "online": "Online: what is learnt from one image is kept for the next",
    "transductive": "Transductive: all images at once",
}
OURS = ("contrast_vote", "parts_and_whole")  # developed here, in this order
TAILS = ("shuffled", "sorted")


def leaderboard(table: dict) -> str:
    """The methods under one prompt: a table for each kind, best first, and what stands out."""
    rows = [row for row in table["rows"] if row["prompt"] == "single"]
    rows.sort(key=lambda row: -row["mean_shifted"])
    streams = (read(STREAMS) or {"rows": {}})["rows"]
    short = {v: VARIANTS.get(v, v).split(":")[0] for v in table["variants"]}
    parts = []
    for kind, title in KINDS.items():
        some = [row for row in rows if row["kind"] == kind]
        if some:
            parts.append(f"**{title}**\n\n{_ranked(some, short, table, streams)}")
    n = " or ".join(f"{x:,}" for x in sorted({r["n"] for r in rows[0]["variants"].values()}))
    settings = sorted({row["settings"] for row in rows})
    text = (
        f"{n} images per variant, seeds of the views: {table['seeds']}; intervals of 95 %, "
        f"paired, over the images of {_listed(table['decisive'], short)}; ECE by variant; ms per "
        f"image from encoded features; settings: {' or '.join(settings)} for all variants."
    )
    if any(row["row"] in streams for row in rows):
        text += " Tail: mean of the worst tenth of the orders, shuffled / class after class."
    parts += [text, *_stands_out(table, rows, short)]
    failed = [f"`{name}` ({why})" for name, why in table.get("failed", {}).items()]
    for what, names in (("Not in this table yet", table["absent"]), ("Failed", failed)):
        parts += [f"{what}: {', '.join(names)}."] if names else []
    return "\n\n".join(parts)


def _listed(variants: list[str], short: dict) -> str:
    *most, last = [short[v] for v in variants]
    return f"{', '.join(most)} and {last}" if most else last


def _ranked(rows: list[dict], short: dict, table: dict, streams: dict) -> str:
    """The table of a kind."""
    rest, tails = table["rest"], any(row["row"] in streams for row in rows)
    tails = tails and rows[0]["kind"] != "episodic"  # they know no order
    means = [_listed(table["decisive"], short)] + ([_listed(rest, short)] if rest else [])
    lines = []
    for row in rows:
        cells = row["variants"].values()
        line = [f"`{row['row']}`", *(percent(x["accuracy"]) for x in cells)]
        line += [percent(row["mean_shifted"])] + (
            [percent(row["mean_shifted_rest"])] if rest else []
        )
        for name in ("zero_shot", "vote"):
            part = row["gains"].get(name, {}).get("shifted")
            line.append(gained(part) if part and row["row"] != name else "")
        line.append(" ".join(f"{100 * x['ece']:.0f}" for x in cells))
        if tails:
            found = streams.get(row["row"], {})
            line.append(" / ".join(percent(found[k]["tail"]) for k in TAILS if k in found))
        lines.append([*line, f"{1000 * row['seconds']:.1f}"])
    head = ["method", *short.values(), *means, "over zero-shot", "over the vote", "ECE"]
    return markdown(" | ".join([*head, *(["tail"] if tails else []), "ms"]), lines)


def _stands_out(table: dict, rows: list[dict], short: dict) -> list[str]:
    """Sentences made from the numbers: our own methods, the ranking without A, who hurts."""
    episodic = {row["row"]: row for row in rows if row["kind"] == "episodic"}
    published = [row for row in episodic.values() if row["published"]]
    best = max(published, key=lambda row: row["mean_shifted"])
    own = [episodic[name] for name in OURS if name in episodic]
    out = []
    for row in own:
        price = row["seconds"] / episodic["vote"]["seconds"]
        lowest = min(row["variants"], key=lambda v: row["variants"][v]["gains"]["zero_shot"][0])
        out.append(
            f"`{row['row']}`, developed here, against the best published episodic method on "
            f"{_listed(table['decisive'], short)} (`{best['row']}`): "
            f"{gained(table['wins'][row['row']][best['row']])} points, at {price:.2f} times the "
            f"time of the vote. Its worst variant against zero-shot: {short[lowest]}, "
            f"{gained(row['variants'][lowest]['gains']['zero_shot'])}."
        )
    if table["rest"]:
        names = [
            sorted(episodic, key=lambda name: -episodic[name][key])[:3]
            for key in ("mean_shifted", "mean_shifted_rest")
        ]
        first, without = (", ".join(f"`{name}`" for name in some) for some in names)
        above = [r for r in rows if r["gains"].get("vote", {}).get("rest", [0, 0])[1] > 0]
        out.append(
            f"First three episodic ones on {_listed(table['decisive'], short)}: {first}; without "
            f"{_listed(table['left_out'], short)}: {without}. On {_listed(table['rest'], short)} "
            f"{len(above)} of {len(rows) - 1} rows are above the vote by an interval that excludes "
            "0."
        )
    return out


def cost(r: dict) -> str:
    """What TPT costs, from the JSON of ``ci/bench/tpt.py``."""
    runs = "one run" if r["repeats"] == 1 else f"medians of {r['repeats']} runs"
    place = " ".join(filter(None, [r.get("processor"), r["device"]]))
    text = f"{r['model']} at full size (random weights: the cost does not depend on them), "
    text += f"{r['classes']:,} classes, {r['views']} views, float32, {place}, torch "
    text += f"{r['torch'].split('+')[0]}; {runs}"
    text += f", **{r['note']}**:\n\n" if r.get("note") else ":\n\n"
    lines = []
    for name, key in (("as the paper's code does it", "paper_s"), ("here", "fast_s")):
        parts = [r["floor_s"], r["views_s"], r[key]]
        cells = [f"{x:.3g}" for x in (*parts, sum(parts))]
        lines.append([name, *cells, f"{sum(parts) / r['floor_s']:.2f}"])
    head = "seconds per image | image encoder | views | adaptation | all | of the encoder"
    text += markdown(head, lines) + f"\n\nAdaptation alone takes {r['ratio_adapt']:.0f} times less"
    text += f", all of it {r['ratio_end_to_end']:.1f} times less"
    if r["memory_ratio"]:
        fast, paper = (r["memory_bytes"][name] / 2**30 for name in ("fast", "paper"))
        text += f", with {r['memory_ratio']:.2f} of the memory ({fast:.1f} of {paper:.1f} GB)"
    a = r["agreement"]
    same = "are the same" if a["same_prediction"] and a["same_selection"] else "DIFFER"
    text += f". Predictions and selected views {same}, logits are within "
    text += f"{a['largest_logit_difference']:.0e}."
    if "once_s" in r:
        text += f" What belongs to the initial context is made once: {r['once_s']:.1f} s."
    return text


def growth(r: dict) -> str:
    """What TPT costs with more classes, views and steps, from ``ci/bench/growth.py``."""
    floors, lines = r["floors"], []
    for name, steps, n in sorted({(c["model"], c["steps"], c["classes"]) for c in r["cells"]}):
        same = {
            c["views"]: c
            for c in r["cells"]
            if (c["model"], c["steps"], c["classes"]) == (name, steps, n)
        }
        line = [name, str(steps), f"{n:,}"]
        for views in floors[name]:
            c = same.get(int(views), {})
            both = [c.get("over_floor"), c.get("over_floor_run")]
            line.append(" / ".join(f"{x:.2f}" for x in both if x is not None) or "-")
        lines.append(line)
    counts = list(dict.fromkeys(views for rows in floors.values() for views in rows))
    head = "model | steps | classes | " + " | ".join(f"{views} views" for views in counts)
    text = "Encoder, views and TPT of one image as a multiple of the encoder alone, random "
    text += f"weights, {' '.join(filter(None, [r.get('processor'), r['device']]))}. Where two "
    text += (
        "numbers stand, the first is an image alone and the second one of many, whose gradients "
    )
    text += f"are one product with a stored Jacobian.\n\n{markdown(head, lines)}"
    if r["left_out"]:
        cells = [f"{m} {n:,} × {v} × {steps}" for m, n, v, steps in r["left_out"]]
        text += f"\n\nNot measured for want of time (classes × views × steps): {', '.join(cells)}."
    return text


SHOWN = (  # rows of the study, by label: a start, the original, and one of each kind
    "CoOp prompt", "TPT", "TPT with AugMix", "patches 4x4: TPT", "patches 4x4, overlap 0.6: TPT",
    "patches 4x4: patch_loss1", "hard5", "soft", "hard1", "patches 4x4, overlap 0.6: hard1",
)  # fmt: skip


def study(rows: list[dict]) -> str:
    """Some rows of the study, measured here and as reported, and how well all of them agree."""
    from scipy.stats import spearmanr

    measured, reported = ([float(row[k]) for row in rows] for k in ("accuracy", "reported"))
    by_label, lines = {row["label"]: row for row in rows}, []
    for label in SHOWN:
        row = by_label[label]
        gain = [row[k] for k in ("gain_vs_baseline", "gain_ci_low", "gain_ci_high")]
        over = "" if label == "TPT" else gained(gain)
        lines.append(
            [label, percent(float(row["accuracy"])), over, f"{float(row['reported']):.1f}"]
        )
    head = "row | IconShift-A, MiniCLIP | over TPT | REPORTED: ImageNet-A, RN50"
    return markdown(head, lines) + (
        f"\n\n{rows[0]['n']} images per row, one seed; gains in points, paired, with 95 % "
        f"intervals. Over all {len(rows)} rows the rank correlation of the two columns is "
        f"{spearmanr(measured, reported).statistic:.2f}."
    )


EVALUATION = MINICLIP / "evaluation.json"
STREAMS = REPO / "data" / "streams.json"
STUDY = REPO / "notebooks" / "results" / "study_500.csv"
SECTIONS = [  # page, name of the section, file of the numbers, how to say them
    (REPO / "README.md", "results", EVALUATION, table),
    (REPO / "README.md", "study", STUDY, study),
    (REPO / "README.md", "leaderboard", REPO / "data" / "leaderboard.json", leaderboard),
    (REPO / "README.md", "cost", REPO / "data" / "bench_rn50.json", cost),
    (REPO / "README.md", "growth", REPO / "data" / "bench_growth.json", growth),
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


def rendered(text: str, name: str, body: str, page: str = "the page") -> str:
    """The page with ``body`` in the section; ``ValueError`` unless it has the section once."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} must hold {begin} and {end} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def pages() -> dict[Path, str]:
    """Each page as it should be."""
    out = {}
    for page, name, source, say in SECTIONS:
        numbers = read(source)
        body = MISSING.format(source.name) if numbers is None else say(numbers)
        text = out.get(page) or page.read_text(encoding="utf-8")
        out[page] = rendered(text, name, body, str(page))
    return out


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the numbers in README and data cards.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if one differs")
    check, bad = parser.parse_args().check, 0
    for page, new in pages().items():
        differs = new != page.read_text(encoding="utf-8")
        if differs and not check:
            page.write_text(new, encoding="utf-8")
        says = "the numbers are those of the measurements"
        if differs:
            says = "run python ci/readme.py, its numbers are of before" if check else "written"
        print(f"{page.relative_to(REPO)}: {says}")
        bad |= differs and check
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
