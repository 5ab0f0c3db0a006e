"""Tables of results as the notebooks print them: runs beside a baseline, the stored sweep.

Text, not numbers, where a cell holds an interval; all shares in per cent, all gains in points.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from tpt_nb import metrics
from tpt_nb.core.paths import REPO
from tpt_nb.lessons.findings import records_of


def share(right) -> tuple[float, float, float]:
    """Right or wrong, bool [N] -> (accuracy, low, high) in per cent, Wilson's 95 % interval."""
    hits, n = int(np.sum(right)), len(right)
    low, high = metrics.wilson(hits, n)
    return 100 * hits / n, 100 * low, 100 * high


def accuracy(run) -> tuple[float, float, float]:
    """Accuracy of a run after adaptation, with its interval, in per cent."""
    return share(metrics.correct(run.records))


def span(low: float, high: float, sign: str = "") -> str:
    """ "4.2 to 8.0"; with sign="+" "-1.0 to +3.1"."""
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def versus(results: Mapping, baseline: str) -> pd.DataFrame:
    """Each run, and what it gains over the one called ``baseline`` on the same images.

    Args:
        results: name -> run (see ``runs.run``), its records, or right or wrong, bool [N].
        baseline: the name that the others are compared with; its own comparison stays empty.
    Returns:
        One row per name: accuracy and its interval, gain and its paired interval, how many images
        get better and worse, and the p-value of McNemar's exact test.
    """
    rows = {}
    for name in results:
        c = _paired(results, baseline, name)
        rows[name] = {
            "accuracy (%)": f"{100 * c['accuracy_b']:.1f}",
            "95 %": span(*(100 * x for x in c["accuracy_b_ci95"])),
            f"against {baseline}": f"{100 * c['gain']:+.1f}",
            "95 % of that": span(*(100 * x for x in c["gain_ci95"]), "+"),
            "better / worse": f"{c['improved']} / {c['worsened']}",
            "p": f"{c['p_value']:.2g}",
        }
    table = pd.DataFrame(rows).T.rename_axis("row")
    table.loc[baseline, f"against {baseline}" : "p"] = ""  # it would be compared with itself
    return table


def gains(results: Mapping, baseline: str) -> dict[str, tuple[float, float, float]]:
    """Name -> (gain, low, high) in points over ``baseline``, as ``figures.intervals`` takes it."""
    found = {name: _paired(results, baseline, name) for name in results if name != baseline}
    return {m: tuple(100 * x for x in (c["gain"], *c["gain_ci95"])) for m, c in found.items()}


def holm(results: Mapping, baseline: str) -> dict[str, float]:
    """Name -> p-value against ``baseline``, corrected for having asked for all of them.

    McNemar's exact p-values; the smallest of m counts m times, the next m - 1 times, and none less
    than one before it (Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979).
    """
    p = {m: _paired(results, baseline, m)["p_value"] for m in results if m != baseline}
    out: dict[str, float] = {}
    for rank, name in enumerate(sorted(p, key=lambda m: p[m])):
        out[name] = min(1.0, max([p[name] * (len(p) - rank), *out.values()]))
    return {name: out[name] for name in p}


def _paired(results: Mapping, baseline: str, name: str) -> dict:
    both = (records_of(results[key]) for key in (baseline, name))
    return metrics.compare(*both, resamples=1)


def stored_study(clip=None, dataset: str = "") -> pd.DataFrame | None:
    """The study's rows, measured with as many images as a file in ``notebooks/results`` has.

    Args:
        clip, dataset: only a table that was made with these weights on this data set.
    Returns:
        Index: label. Among the columns: n, accuracy, reported, file, and hits: bool [n] each, the
        images that are right. None if no table fits.
    """
    files = (REPO / "notebooks" / "results").glob("study_*.csv")
    for path in sorted(files, key=lambda path: -int(path.stem.split("_")[1])):
        table = pd.read_csv(path).set_index("label")
        ours = clip is None or (table.model_fingerprint == clip.fingerprint).all()
        if ours and (not dataset or (table.dataset == dataset).all()):
            table["file"] = path.name
            bits = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in table.right]
            hits = [np.unpackbits(b)[:n].astype(bool) for b, n in zip(bits, table.n, strict=True)]
            table["hits"] = hits
            return table
    return None
