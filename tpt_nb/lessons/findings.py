"""Findings: sentences about the numbers of this run, whose wording is chosen by the numbers.

A finding stands below the table or the figure that it is about, and the same cell writes "gains",
"no difference shown" or "loses" in each profile, whatever comes out. Each function shows one line
of Markdown that begins with ``**Finding.**`` and returns the sentence without that mark, for
``answers`` in the conclusion. "Shown" means: the 95 % interval leaves out 0.

The numbers are also kept, unseen, in the metadata of the output, under the names that a sentence in
Markdown refers to; ``ci/lint_findings.py`` compares the two.
"""

import math
import string
from collections.abc import Mapping, Sequence

import numpy as np

from tpt_nb import metrics

KEY = "tpt_nb"  # where an output's metadata hold the values: {KEY: {"values": {name: number}}}
MARK = "**Finding.** "
CLEAR = 0.8  # |rank correlation| from which a few points count as a direction
Value = float | tuple[float, float, float]  # or with its interval: (value, low, high)


def compare(base, other, base_name: str, name: str) -> str:
    """What ``other`` gains or loses over ``base``, image by image.

    Args:
        base, other: a run, or records (a list of dicts or a frame), of which "after" counts; or
            bool [N], right or wrong, of the same images in the same order.
        base_name, name: what the sentence calls them.
    Raises:
        ValueError: they share no image, or an image has different targets.
    Publishes the gain as ``"<name> over <base_name>"`` and both accuracies in %.
    """
    result = metrics.compare(records_of(base), records_of(other), resamples=1)
    return _paired(result, base_name, name)


def adapted(run, name: str, base_name: str = "zero-shot") -> str:
    """What adaptation gains or loses within one run: "after" against "before" (see ``metrics``)."""
    numbers = metrics.summarize(records_of(run))
    numbers |= {"accuracy_a": numbers["accuracy_before"], "accuracy_b": numbers["accuracy_after"]}
    return _paired(numbers, base_name, name)


def _paired(result: Mapping, base_name: str, name: str) -> str:
    gain, (low, high) = result["gain"], result["gain_ci95"]
    images = "1 image" if result["n"] == 1 else f"{result['n']} images"
    better, worse = result["improved"], result["worsened"]
    changed = f"{better} get{'s' if better == 1 else ''} better, {worse} worse"
    if not better + worse:
        changed = "both are right on the same images"
    text = _verdict(100 * gain, 100 * low, 100 * high, name, base_name, f" on {images}")
    values = {f"{name} over {base_name}": 100 * gain}
    values |= {f"accuracy of {base_name}": 100 * result["accuracy_a"]}
    values |= {f"accuracy of {name}": 100 * result["accuracy_b"]}
    return _show(f"{text}{';' if _word(low, high) == 0 else ':'} {changed}.", values)


def gain(value: float, low: float, high: float, what: str, over: str) -> str:
    """The same for a difference whose interval is known already; all three in points.

    Raises:
        ValueError: the interval does not hold the value.
    """
    if not low - 1e-9 <= value <= high + 1e-9:  # of numbers that are all the same, to rounding
        raise ValueError(f"the interval [{low:g}, {high:g}] of {what!r} does not hold {value:g}")
    return _show(_verdict(value, low, high, what, over) + ".", {f"{what} over {over}": value})


def _word(low: float, high: float) -> int:
    """1: a gain is shown, -1: a loss, 0: neither."""
    return int(low > 0) - int(high < 0)


def _verdict(value: float, low: float, high: float, what: str, over: str, where: str = "") -> str:
    """ "TPT gains 11.0 points [6.8, 15.2] over zero-shot on 500 images", without full stop."""
    digits = 2 if any(x and abs(x) < 0.05 for x in (low, high)) else 1  # never "gains [0.0, ..."
    interval = f"[{_number(low, digits)}, {_number(high, digits)}]"
    word = _word(low, high)
    if not word:
        points = f"{value:+.{digits}f} points".replace("-", "−")
        return f"{what} against {over}{where}: no difference shown, {points} {interval}"
    verb, preposition = ("gains", "over") if word > 0 else ("loses", "against")
    return f"{what} {verb} {abs(value):.{digits}f} points {interval} {preposition} {over}{where}"


def best(values: Mapping[str, Value], unit: str = "%", lowest: bool = False) -> str:
    """Best, next and worst of several values, and whether the intervals of the first two overlap.

    A value that is no number (a share of no images) takes no part, and the sentence says so.

    Args:
        values: per name a number, or a number with its interval (value, low, high).
        unit: stands after each number; "" for none.
        lowest: the lowest is the best (errors, seconds).
    Raises:
        ValueError: there are fewer than two.
    Publishes each value under its name.
    """
    numbers = {name: _first(value) for name, value in values.items()}
    if len(numbers) < 2:
        raise ValueError(f"best needs two or more numbers, got {numbers}")
    none = [name for name, value in numbers.items() if not math.isfinite(value)]
    numbers = {name: value for name, value in numbers.items() if name not in none}
    rest = f". Without a value: {', '.join(none)}" if none else ""
    if len(numbers) < 2:
        return _show(f"Nothing to compare{rest}.", numbers)
    order = sorted(numbers, key=lambda name: numbers[name], reverse=not lowest)
    digits = _digits(list(numbers.values()))
    told = {name: f"{_number(numbers[name], digits)}{_unit(unit)}" for name in order}
    first, second, last = order[0], order[1], order[-1]
    ties = [name for name in order if told[name] == told[first]]
    if len(ties) == len(order):
        text = f"All {len(order)} give the same: {told[first]}"
    elif len(ties) > 1:
        text = f"Best of {len(order)}: {' and '.join(ties)} with {told[first]} each; "
        text += f"worst: {last} with {told[last]}"
    else:
        text = f"Best of {len(order)}: {first} with {told[first]}; "
        text += f"next: {second} with {told[second]}"
        text += f"; worst: {last} with {told[last]}" if last != second else ""
        if not any(np.isscalar(values[name]) for name in (first, second)):
            (_, a, b), (_, c, d) = values[first], values[second]
            overlap = "overlap" if a <= d and c <= b else "do not overlap"
            text += f". The intervals of {first} and {second} {overlap}"
    return _show(f"{text}{rest}.", numbers)


def trend(x: Sequence[float], y: Sequence[float], what: str, unit: str, along: str = "") -> str:
    """Whether ``y`` rises or falls with ``x``, by Spearman's rank correlation (1904).

    Args:
        x, y: [N] numbers, N >= 3.
        what: what ``y`` is; ``unit`` stands after its values.
        along: what ``x`` is ("views").
    Raises:
        ValueError: fewer than three points, or lengths that differ.
    Publishes ``"<what> at <x>"`` for both ends.
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 3:
        raise ValueError(f"a trend needs three or more points, got x {a.shape} and y {b.shape}")
    known = np.isfinite(a) & np.isfinite(b)  # a share of no images is no number
    order = np.argsort(a[known], kind="stable")
    a, b = a[known][order], b[known][order]
    if len(a) < 3:
        return _show(f"{what}: too few points with a value to tell a direction.", {})
    digits, at = _digits(b.tolist()), [_number(u, _digits(a.tolist())) for u in a]
    ends = [f"{_number(v, digits)}{_unit(unit)} at {u}" for u, v in zip(at, b, strict=True)]
    values = {f"{what} at {at[k]}": float(b[k]) for k in (0, -1)}
    axis = f" with {along}" if along else ""
    if len({_number(v, digits) for v in b}) == 1:
        return _show(f"{what} does not change{axis}: {ends[0]} and at {at[-1]}.", values)
    rho = float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])
    if abs(rho) < CLEAR:
        lowest, highest = ends[int(b.argmin())], ends[int(b.argmax())]
        text = f"{what} has no clear direction{axis}: lowest {lowest}, highest {highest}"
    else:
        word = "rises" if rho > 0 else "falls"
        text = f"{what} {word}{axis}, from {ends[0]} to {ends[-1]}"
    told = f"{rho:+.2f}".replace("-", "−")
    return _show(f"{text} (rank correlation {told}, {len(a)} points).", values)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values share their mean rank."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def say(text: str, /, **values) -> str:
    """A sentence of the caller's own: ``say("{n} change, {share:.1f} %", n=61, share=12.2)``.

    Publishes each number under its name (``n``, ``share``).
    """
    names = {field for _, field, _, _ in string.Formatter().parse(text) if field}
    if unused := set(values) - names:
        raise ValueError(f"the sentence has no place for {', '.join(sorted(unused))}")
    numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float | np.number)}
    return _show(text.format(**values), numbers)


def answers(*sentences: str) -> None:
    """The sentences that findings returned, again, as the list that opens a conclusion."""
    _display("**In numbers**\n\n" + "\n".join(f"- {sentence}" for sentence in sentences))


def value(name: str, number: float) -> float:
    """Publish a number, unseen, for a sentence in Markdown: ``41.0 %<!--=name-->``."""
    from IPython.display import display

    display({}, raw=True, metadata={KEY: {"values": {name: float(number)}}})
    return number


def records_of(run):
    """The records of a run; of right or wrong [N] the least that ``metrics`` needs."""
    if isinstance(run, np.ndarray):
        ids = enumerate(run.astype(bool).tolist())
        return [{"id": i, "target": 1, "pred_before": 0, "pred_after": int(r)} for i, r in ids]
    return getattr(run, "records", run)


def _first(value: Value) -> float:
    return float(value if np.isscalar(value) else value[0])


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def _digits(numbers: Sequence[float]) -> int:
    """Decimals that show three figures of the largest, one at least unless all are whole."""
    if all(float(v).is_integer() for v in numbers):
        return 0
    largest = max(abs(v) for v in numbers)
    return 1 if largest >= 10 else 2 if largest >= 1 else 3


def _number(number: float, digits: int) -> str:
    """With a real minus sign, and without that of zero."""
    text = f"{number:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


class Sentence(str):
    """A sentence that stands in the output already: as the last value of a cell it adds nothing."""

    def _ipython_display_(self) -> None:
        pass


def _show(sentence: str, values: Mapping[str, float]) -> str:
    if sentence.split(" ")[0].isalpha():  # a word, and not a name such as hard1 or patch_loss
        sentence = sentence[0].upper() + sentence[1:]
    _display(MARK + sentence, values)
    return Sentence(sentence)


def _display(markdown: str, values: Mapping[str, float] | None = None) -> None:
    from IPython.display import display

    metadata = {KEY: {"values": {k: round(v, 6) for k, v in values.items()}}} if values else {}
    display(
        {"text/markdown": markdown, "text/plain": markdown.replace("**", "")},
        raw=True,
        metadata=metadata,
    )
