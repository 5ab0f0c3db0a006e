"""Numbers from records: accuracy, entropy, calibration, intervals and paired tests.

A record is one image of a run (see ``runs``); every function here takes a list of such dicts or a
``pandas.DataFrame`` of them, and returns plain Python numbers, tuples, dicts or a ``DataFrame``.
"before" is the prediction with the initial prompt on the un-augmented image, "after"
that of the adapted one. Fractions are in [0, 1], entropies and cross-entropies in nats. Intervals
are 95 % unless ``level`` says otherwise.
"""

import math
from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Union

import numpy as np

if TYPE_CHECKING:  # pandas is imported by who wants a table: a run from a shell does not
    import pandas as pd

Records = Union[Iterable[Mapping], "pd.DataFrame"]
NEEDED = ["id", "target", "pred_before", "pred_after"]
WHEN = ("before", "after")


def frame(records: Records) -> "pd.DataFrame":
    """The records as a table.

    Raises ``ValueError`` if there are none, a needed column is missing, or an image is there twice.
    """
    import pandas as pd

    table = _checked(records)
    return pd.DataFrame(table) if isinstance(table, list) else table


def _checked(records: Records) -> "list[Mapping] | pd.DataFrame":
    """The table, or a list of the records; raises as :func:`frame`."""
    table = records if _is_frame(records) else list(records)
    if not len(table):
        raise ValueError("no records: there is nothing to measure")
    known = _names(table)
    missing = [name for name in NEEDED if name not in known]
    if missing:
        raise ValueError(f"records lack {', '.join(missing)}; they have {', '.join(known)}")
    ids = _values(table, "id").tolist()
    if len(set(ids)) < len(ids):
        seen: set = set()
        twice = [i for i in ids if i in seen or seen.add(i)]
        raise ValueError(f"{len(twice)} image ids are there twice, for example {twice[0]!r}")
    return table


def _is_frame(records: Records) -> bool:
    return hasattr(records, "columns")


def _names(table) -> list[str]:
    """The columns that there are."""
    if _is_frame(table):
        return list(table.columns)
    return list(dict.fromkeys(name for record in table for name in record))


def _values(table, name: str) -> np.ndarray:
    """A column ``[N]``; what a record lacks is not a number."""
    if _is_frame(table):
        return table[name].to_numpy()
    return np.array([record.get(name, math.nan) for record in table])


def correct(records: Records, when: str = "after") -> np.ndarray:
    """bool [N]: was the prediction right? ``when`` is "before" or "after"."""
    return _column(records, "pred", when) == _values(_checked(records), "target")


def accuracy(records: Records, when: str = "after") -> float:
    """Top-1 accuracy as a fraction."""
    return float(correct(records, when).mean())


def top5(records: Records, when: str = "after") -> float:
    """Fraction of images whose class is among the five most probable ones."""
    return float(_column(records, "top5", when).mean())


def mean_entropy(records: Records, when: str = "after") -> float:
    """Mean entropy (nats) of the predicted distributions."""
    return float(_column(records, "entropy", when).mean())


def cross_entropy(records: Records, when: str = "after") -> float:
    """Mean negative log-probability of the true class (nats).

    A probability that was written as 0 counts as 1e-45 (float32's smallest number), so that one
    hopeless image does not make the mean infinite.
    """
    return float(-np.log(np.maximum(_column(records, "prob_target", when), 1e-45)).mean())


def ece(records: Records, when: str = "after", bins: int = 15) -> float:
    """Expected calibration error: mean over images of |accuracy - mean confidence| of their bin.

    ``bins`` of equal width, (i/bins, (i+1)/bins], over the confidence, the largest predicted
    probability. 15 as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; C-TPT
    uses 20.
    """
    return calibration_error(_column(records, "conf", when), correct(records, when), bins)


def calibration_error(confidence, correct, bins: int = 15) -> float:
    """:func:`ece` of the confidences ``[N]`` and of whether each prediction was right."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    gap = np.bincount(_bin(confidence, bins), weights=correct - confidence)
    return float(np.abs(gap).sum() / len(confidence))


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    """The bin that each confidence is in, int [N]."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def reliability(confidence, correct, bins: int = 15) -> "pd.DataFrame":
    """What a calibration diagram shows: per bin of :func:`ece` n, mean confidence and accuracy.

    ``confidence`` and ``correct``: [N], the largest predicted probability and whether it was right.
    Empty bins are left out.
    """
    import pandas as pd

    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    table = pd.DataFrame({"n": 1, "confidence": confidence, "accuracy": correct})
    sums = table.groupby(_bin(confidence, bins)).sum()
    sums[["confidence", "accuracy"]] = sums[["confidence", "accuracy"]].div(sums["n"], axis=0)
    sums.index.name = "bin"
    return sums


def changes(records: Records) -> dict[str, int]:
    """How many images adaptation turned right (improved) and wrong (worsened)."""
    before, after = correct(records, "before"), correct(records, "after")
    return {"improved": int((~before & after).sum()), "worsened": int((before & ~after).sum())}


def per_class(records: Records, classnames: list[str] | None = None) -> "pd.DataFrame":
    """Per class that has images n, accuracy_before and _after, improved, worsened; index target.

    With top5_before and _after where the records have them.
    """
    table = frame(records)
    before, after = correct(table, "before"), correct(table, "after")
    flags = {"n": 1, "accuracy_before": before, "accuracy_after": after}
    shares = [f"accuracy_{when}" for when in WHEN]
    for name in (f"top5_{when}" for when in WHEN):
        if name in table:
            flags[name] = table[name].to_numpy(bool)
            shares.append(name)
    flags |= {"improved": ~before & after, "worsened": before & ~after}
    import pandas as pd

    rows = pd.DataFrame(flags).groupby(table["target"].to_numpy()).sum().astype(int)
    for name in shares:
        rows[name] = rows[name] / rows["n"]
    rows.index.name = "target"
    if classnames is not None:
        rows.insert(0, "class", [classnames[i] for i in rows.index])
    return rows


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): honest near 0 and 1 and for small n."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = _z(level)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # the formula is exactly 0 and 1 at the ends; rounding is not
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def mcnemar(improved: int, worsened: int) -> float:
    """Two-sided p-value of McNemar's paired test, exact (binomial) at every count.

    Under "no difference" each image on which the two disagree is a fair coin. No such image: p = 1.
    """
    if improved < 0 or worsened < 0:
        raise ValueError(f"counts cannot be negative: {improved}, {worsened}")
    if improved + worsened == 0:
        return 1.0
    n, fewer = int(improved + worsened), int(min(improved, worsened))
    ways = total = 1  # how many of the 2^n outcomes have k heads, and how many at most k
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def gain_interval(improved: int, worsened: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the paired difference of two accuracies, (improved - worsened) / n.

    The adjusted Wald interval of Bonett and Price (2012): one image is added to each kind of
    disagreement, which keeps the coverage when few images change.
    """
    if n < 1 or improved < 0 or worsened < 0 or improved + worsened > n:
        raise ValueError(f"need improved + worsened <= n, got {improved}, {worsened} of {n}")
    up, down = (improved + 1) / (n + 2), (worsened + 1) / (n + 2)
    half = _z(level) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def bootstrap_difference(
    a, b, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(b) - mean(a) when images are drawn again with replacement.

    ``a`` and ``b``: [N] values of two runs (right or wrong, cross-entropy, ...), image by image.
    """
    difference = np.asarray(b, float) - np.asarray(a, float)
    n = len(difference)
    if n == 0:
        raise ValueError("no pairs to resample")
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // n)  # bounds the memory
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    means = np.concatenate([difference[rng.integers(0, n, (k, n))].mean(1) for k in sizes])
    return _middle(means, level)


def _middle(draws: np.ndarray, level: float) -> tuple[float, float]:
    """The interval that leaves out equally many draws on both sides."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_gain(
    a, b, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean over data sets of mean(b) - mean(a), with its bootstrap interval: (gain, low, high).

    ``a`` and ``b``: a sequence of arrays, one per data set, the values of two methods image by
    image (right or wrong, or the mean of that over seeds). Images are drawn again within each data
    set, so that all sets count the same whatever their size.
    """
    sizes = [len(x) for x in a]
    if not sizes or 0 in sizes or sizes != [len(y) for y in b]:
        raise ValueError("a and b need the same data sets, each with the same images in both")
    rng, total, gain = np.random.default_rng(seed), np.zeros(resamples), 0.0
    for x, y in zip(a, b, strict=True):
        difference = np.asarray(y, float) - np.asarray(x, float)
        gain += difference.mean()
        # only the counts of the distinct values matter: a multinomial draw, fast for any n
        values, counts = np.unique(difference, return_counts=True)
        draws = rng.multinomial(len(difference), counts / counts.sum(), size=resamples)
        total += draws @ values / len(difference)
    return float(gain / len(a)), *_middle(total / len(a), level)


def summarize(records: Records, bins: int = 15) -> dict:
    """Every number of one run, before and after: with intervals, changes and the paired test.

    Columns beyond the predictions (confidence, entropy ...) are used where the records have them.
    """
    table = _checked(records)
    n, known = len(table), _names(table)
    out: dict = {"n": n}
    for when in WHEN:
        hits = int(correct(table, when).sum())
        out[f"accuracy_{when}"] = hits / n
        out[f"accuracy_{when}_ci95"] = list(wilson(hits, n))
        for name, column, measure in (
            ("top5", "top5", top5),
            ("entropy", "entropy", mean_entropy),
            ("cross_entropy", "prob_target", cross_entropy),
            ("ece", "conf", lambda t, w: ece(t, w, bins)),
        ):
            if f"{column}_{when}" in known:
                out[f"{name}_{when}"] = measure(table, when)
    out.update(changes(table))
    improved, worsened = out["improved"], out["worsened"]
    out["gain"] = (improved - worsened) / n
    out["gain_ci95"] = list(gain_interval(improved, worsened, n))
    out["p_value"] = mcnemar(improved, worsened)
    return out


def compare(records_a: Records, records_b: Records, resamples: int = 10_000, seed: int = 0) -> dict:
    """Run b against run a, image by image ("after" of both), over the images that both have.

    Returns n (pairs), only_a and only_b (images without a partner), accuracies with Wilson
    intervals, improved (wrong in a, right in b), worsened, gain = b - a with its paired interval
    and its bootstrap interval, McNemar's p_value. Raises ``ValueError`` if no image is in both or
    if an image has different targets.
    """
    pairs = frame(records_a).merge(frame(records_b), on="id", suffixes=("_a", "_b"))
    n, n_a, n_b = len(pairs), len(frame(records_a)), len(frame(records_b))
    if n == 0:
        raise ValueError("the two runs share no image id: they are runs over different images")
    other = pairs[pairs["target_a"] != pairs["target_b"]]
    if len(other):
        raise ValueError(
            f"{len(other)} images have another target in each run, for example "
            f"{other['id'].iloc[0]!r}: the runs do not use the same data set"
        )
    a = (pairs["pred_after_a"] == pairs["target_a"]).to_numpy()
    b = (pairs["pred_after_b"] == pairs["target_b"]).to_numpy()
    improved, worsened = int((~a & b).sum()), int((a & ~b).sum())
    return {
        "n": n,
        "only_a": n_a - n,
        "only_b": n_b - n,
        "accuracy_a": float(a.mean()),
        "accuracy_a_ci95": list(wilson(int(a.sum()), n)),
        "accuracy_b": float(b.mean()),
        "accuracy_b_ci95": list(wilson(int(b.sum()), n)),
        "improved": improved,
        "worsened": worsened,
        "gain": (improved - worsened) / n,
        "gain_ci95": list(gain_interval(improved, worsened, n)),
        "gain_bootstrap95": list(bootstrap_difference(a, b, resamples, seed)),
        "p_value": mcnemar(improved, worsened),
    }


def _column(records: Records, name: str, when: str) -> np.ndarray:
    table, column = _checked(records), f"{name}_{when}"
    if when not in WHEN:
        raise ValueError(f"when must be 'before' or 'after', got {when!r}")
    if column not in _names(table):
        raise ValueError(f"records have no {column!r}; they have {', '.join(_names(table))}")
    return _values(table, column).astype(float)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)
