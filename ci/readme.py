"""Write the README's table of results from ``data/miniclip/evaluation.json``.

``python ci/readme.py`` writes the table between the markers, ``--check`` fails if the README is not
what it would write. Numbers are never typed by hand.
"""

import argparse
import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"
EVALUATION = REPO / "data" / "miniclip" / "evaluation.json"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MISSING = "Not measured yet: `python data/miniclip/evaluate.py --write` measures them."

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


def rendered(text: str, evaluation: dict | None) -> str:
    """The README with the table between the markers; ``ValueError`` if they are not there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    body = MISSING if evaluation is None else table(evaluation)
    return f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the README's table of results.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if it differs")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    evaluation = json.loads(EVALUATION.read_text()) if EVALUATION.is_file() else None
    new = rendered(text, evaluation)
    if new == text:
        print("README.md: the table is that of the measurements")
        return 0
    if check:
        print("README.md: the table is not that of the measurements; run python ci/readme.py")
        return 1
    README.write_text(new, encoding="utf-8")
    print("README.md: table written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
