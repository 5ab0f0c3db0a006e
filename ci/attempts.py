"""What was tried on the way to ``contrast_vote`` and ``parts_and_whole``, on development data only.

    python ci/attempts.py            the attempts and the grids, as tables
    python ci/attempts.py --write    stores them as data/attempts.json, where notebook 10 reads them

Development data: ``iconshift-dev`` (small objects in clutter), ``iconshift-v2`` (new scenes), V2
with damage that no variant of the benchmark has (noise, blur, outlines), and for the second method
also ``iconshift-ink`` (source sprites in one ink) and outlined small objects. Nothing here ever
looks at A, R or Sketch. An attempt is a function of the logits of an image's views [B,V,C] and
their features [B,V,D], to scores [B,C]; all see the same views.
"""

import itertools
import sys
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from tpt_nb import datasets, features, metrics, models, views  # noqa: E402
from tpt_nb.core.files import write_json  # noqa: E402
from tpt_nb.core.paths import DATA  # noqa: E402
from tpt_nb.losses import entropy  # noqa: E402

STORED = DATA / "attempts.json"
# (data set, damage, severity, images)
SUITE = [
    ("iconshift-dev", "", 0, 600),
    ("iconshift-v2", "", 0, 400),
    ("iconshift-v2", "noise", 4, 200),
    ("iconshift-v2", "blur", 5, 200),
    ("iconshift-v2", "outline", 2, 200),
]
SECOND = [
    ("iconshift-dev", "", 0, 600),
    ("iconshift-v2", "", 0, 300),
    ("iconshift-ink", "", 0, 600),
    ("iconshift-v2", "outline", 2, 300),
    ("iconshift-v2", "noise", 4, 300),
    ("iconshift-v2", "blur", 5, 300),
    ("iconshift-dev", "outline", 2, 300),
]
GRID = {
    "contrast": (0.0, 0.2, 0.3, 0.4, 0.5, 0.7),
    "temperature": (1.0, 1.5, 2.0, 3.0),
    "image": (0.0, 2.0, 4.0, 8.0, 16.0),
}


# the last round of the second method; what came before it fitted more constants by gradient
SECOND_GRID = {
    "contrast": (0.7,),
    "temperature": (1.0, 1.3, 1.6),
    "certainty": (1.6, 2.0, 2.5),
    "whole": (0.4, 0.5, 0.6),
    "near": (0.07, 0.1),
}
FROZEN = {"contrast": 0.7, "temperature": 1.3, "certainty": 1.6, "whole": 0.5, "near": 0.1}


def confident(z: Tensor, k: int, key: Tensor | None = None) -> Tensor:
    """The rows of the k views of lowest entropy (or key)."""
    order = (entropy(z) if key is None else key).argsort(dim=-1, stable=True)[:, :k]
    return z.gather(1, order[..., None].expand(-1, -1, z.shape[-1]))


def mean_of(z: Tensor, k: int, key: Tensor | None = None) -> Tensor:
    """The mean prediction of these views."""
    return confident(z, k, key).softmax(-1).mean(1)


def contrast_vote(
    z: Tensor, contrast: float, temperature: float, image: float, power: int = 2
) -> Tensor:
    """The method's scores, with another power of the probabilities; see ``tpt_nb.methods``."""
    each = ((z - contrast * z.mean(1, keepdim=True)) / temperature).softmax(-1).pow(power).sum(1)
    return each + image * (z[:, 0] / temperature).softmax(-1).pow(power)


def margin(z: Tensor) -> Tensor:
    best = z.softmax(-1).topk(2).values
    return best[..., 1] - best[..., 0]


def agreement(z: Tensor, power: float, temperature: float = 0.5) -> Tensor:
    """Certain views that others agree with: exp(-H/T) times (mean p_i . p_j)^power."""
    p = z.softmax(-1)
    alike = p @ p.transpose(1, 2)
    support = (alike.sum(-1) - alike.diagonal(dim1=1, dim2=2)) / (z.shape[1] - 1)
    return ((support**power * (-entropy(z) / temperature).exp())[..., None] * p).sum(1)


def crowd(z: Tensor, f: Tensor) -> Tensor:
    """R-TPT's weights without its tuning: the mean cosine to the 20 most similar views / 0.01."""
    near = (f @ f.transpose(1, 2)).topk(21).values[..., 1:].mean(-1)
    return ((near / 0.01).softmax(-1)[..., None] * z).sum(1)


def vote(z: Tensor, k: int) -> Tensor:
    kept = confident(z, k)
    return F.one_hot(kept.argmax(-1), z.shape[-1]).sum(1) + 1e-3 * kept.softmax(-1).mean(1)


def sharpest(z: Tensor) -> Tensor:
    """All views, each with weight exp(-H/0.2)."""
    return ((-entropy(z) / 0.2).softmax(1)[..., None] * z.softmax(-1)).sum(1)


def nearly_whole(z: Tensor, f: Tensor, near: float) -> Tensor:
    """The mean logits of the views that look like the image."""
    alike = (f @ f[:, 0, :, None])[..., 0] / near
    return (alike.softmax(-1)[..., None] * z).sum(1)


def parts(z: Tensor, contrast: float, temperature: float, certainty: float) -> Tensor:
    """The log of the sum of the predictions, each with weight exp(-certainty * entropy)."""
    scaled = (z - contrast * z.mean(1, keepdim=True)) / temperature
    log_p, weight = scaled.log_softmax(-1), -certainty * entropy(scaled)
    return (log_p + weight[..., None]).logsumexp(1)


def parts_and_whole(z: Tensor, f: Tensor, whole: float, near: float, **votes: float) -> Tensor:
    """The second method's scores but for their sharpness; see ``tpt_nb.methods``."""
    return parts(z, **votes) + whole * nearly_whole(z, f, near)


def ours(**changed: float):
    """An attempt: the second method with other numbers."""
    return lambda z, f: parts_and_whole(z, f, **{**FROZEN, **changed})


def surer(z: Tensor) -> Tensor:
    """How much surer the six surest views are than the image, in nats, [B]."""
    h = entropy(z)
    return h[:, 0] - h.topk(6, largest=False).values.mean(1)


def mixed(z: Tensor, f: Tensor) -> Tensor:
    """Parts and whole in a sum of probabilities, not of their logarithms."""
    a, b = parts(z, 0.7, 1.3, 1.6), nearly_whole(z, f, 0.1)
    return torch.logaddexp(a.log_softmax(-1), b.log_softmax(-1))


def stays(z: Tensor, f: Tensor) -> Tensor:
    """The image's class, unless another is ahead by a factor e."""
    out = ours()(z, f).log_softmax(-1)
    return out + F.one_hot(z[:, 0].argmax(-1), z.shape[-1])


def gated(z: Tensor, f: Tensor) -> Tensor:
    """Crops only where they are surer than the image by 0.8 nats, else the nearly whole views."""
    crops = surer(z) > 0.8
    return torch.where(crops[:, None], parts(z, 0.7, 1.3, 1.6), nearly_whole(z, f, 0.1))


ATTEMPTS = {
    "zero-shot": lambda z, f: z[:, 0],
    "confident views, 6": lambda z, f: mean_of(z, 6),
    "confident views, 19": lambda z, f: mean_of(z, 19),
    "all views": lambda z, f: z.softmax(-1).mean(1),
    "vote, 6": lambda z, f: vote(z, 6),
    "vote, 19": lambda z, f: vote(z, 19),
    "mean of logits, 6": lambda z, f: confident(z, 6).mean(1),
    "largest logit of any view": lambda z, f: z.amax(1),
    "chosen by margin, 6": lambda z, f: mean_of(z, 6, margin(z)),
    "weights exp(-H/0.2)": lambda z, f: sharpest(z),
    "agreement of predictions, ^1": lambda z, f: agreement(z, 1.0),
    "agreement of predictions, ^2": lambda z, f: agreement(z, 2.0),
    "crowded features": crowd,
    "times view 0": lambda z, f: mean_of(z, 6).clamp_min(1e-9).log() + z[:, 0].log_softmax(-1),
    "squares of probabilities": lambda z, f: contrast_vote(z, 0.0, 1.0, 0.0),
    "cubes of softened probabilities": lambda z, f: contrast_vote(z, 0.0, 2.0, 0.0, power=3),
    "vote, 6, with contrast": lambda z, f: vote(z - 0.4 * z.mean(1, keepdim=True), 6),
    "squares, softened": lambda z, f: contrast_vote(z, 0.0, 2.0, 0.0),
    "  + image": lambda z, f: contrast_vote(z, 0.0, 2.0, 2.0),
    "  + contrast": lambda z, f: contrast_vote(z, 0.4, 2.0, 0.0),
    "  + both (contrast_vote)": lambda z, f: contrast_vote(z, 0.4, 2.0, 2.0),
    "  + both, cubes": lambda z, f: contrast_vote(z, 0.4, 2.0, 2.0, power=3),
    "best view by the label (no method)": None,
}


ATTEMPTS_2 = {
    "zero-shot": ATTEMPTS["zero-shot"],
    "vote, 6": ATTEMPTS["vote, 6"],
    "confident views, 6": ATTEMPTS["confident views, 6"],
    "contrast_vote": ATTEMPTS["  + both (contrast_vote)"],
    "image less 0.4 of the views' mean": lambda z, f: z[:, 0] - 0.4 * z.mean(1),
    "crowded features": crowd,
    "crowded features + image": lambda z, f: crowd(z, f) + z[:, 0],
    "nearly whole views, 0.05": lambda z, f: nearly_whole(z, f, 0.05),
    "nearly whole views, 0.1": lambda z, f: nearly_whole(z, f, 0.1),
    "parts": lambda z, f: parts(z, 0.7, 1.3, 1.6),
    "parts or whole by a gate": gated,
    "parts and whole in a sum": mixed,
    "parts x image": ours(near=1e-3),
    "parts x whole without contrast": ours(contrast=0.0),
    "parts x whole without certainty": ours(certainty=0.0),
    "parts x whole, stays with the image": stays,
    "parts x whole (parts_and_whole)": ours(),
}


@torch.no_grad()
def load(clip, suite) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name -> logits, features, targets of each data set of the suite."""
    out = {}
    for name, kind, severity, n in suite:
        data = datasets.load(name, n=n)
        data = datasets.corrupted(data, kind, severity) if kind else data
        f = features.encode(data, clip, views.RandomViews(n_aug=63, size=clip.image_size))
        text = models.Prompts(clip, data.classnames).text_features()
        z = clip.logit_scale * f.features.to(clip.device) @ text.T
        out[data.name.removeprefix("iconshift-")] = (z.cpu(), f.features, f.targets)
    return out


def hits(attempt, z: Tensor, f: Tensor, y: Tensor) -> Tensor:
    """Right or wrong, [N]."""
    if attempt is None:
        return (z.argmax(-1) == y[:, None]).any(1)
    parts = zip(z.split(100), f.split(100), strict=True)
    return torch.cat([attempt(a, b).argmax(-1) for a, b in parts]) == y


def first(sets: dict) -> dict:
    """Rows and grid of contrast_vote."""
    base = {s: hits(ATTEMPTS["vote, 6"], *v).float().numpy() for s, v in sets.items()}

    def line(attempt) -> dict:
        right = {s: hits(attempt, *v).float().numpy() for s, v in sets.items()}
        gain = metrics.mean_gain(list(base.values()), list(right.values()), resamples=4000)
        accuracy = {s: float(x.mean()) for s, x in right.items()}
        mean = sum(accuracy.values()) / len(accuracy)
        return {"accuracy": accuracy, "mean": mean, "gain_over_vote": gain}

    rows = [{"attempt": name} | line(attempt) for name, attempt in ATTEMPTS.items()]
    grid = []
    for values in itertools.product(*GRID.values()):
        params = dict(zip(GRID, values, strict=True))
        grid.append(params | line(lambda z, f, p=params: contrast_vote(z, **p)))
    ranked = sorted(grid, key=lambda row: -row["mean"])
    return {"rows": rows, "grid": grid, "best": {name: ranked[0][name] for name in GRID}}


def second(sets: dict) -> dict:
    """Rows and grid of parts_and_whole; and for each set, how it fares when the others choose."""
    base = {s: hits(ATTEMPTS["zero-shot"], *v).float().numpy() for s, v in sets.items()}

    def line(attempt) -> dict:
        right = {s: hits(attempt, *v).float().numpy() for s, v in sets.items()}
        gains = {s: metrics.mean_gain([base[s]], [right[s]], resamples=2000) for s in sets}
        accuracy = {s: float(x.mean()) for s, x in right.items()}
        mean = sum(accuracy.values()) / len(accuracy)
        return {"accuracy": accuracy, "mean": mean, "gain_over_zero_shot": gains}

    rows = [{"attempt": name} | line(attempt) for name, attempt in ATTEMPTS_2.items()]
    grid = []
    for values in itertools.product(*SECOND_GRID.values()):
        params = dict(zip(SECOND_GRID, values, strict=True))
        grid.append(params | line(ours(**params)))
    best = max(grid, key=lambda row: row["mean"])
    held_out = {}
    for s in sets:
        chosen = max(grid, key=lambda row: row["mean"] * len(sets) - row["accuracy"][s])
        held_out[s] = {name: chosen[name] for name in SECOND_GRID} | {
            "accuracy": chosen["accuracy"][s],
            "zero_shot": float(base[s].mean()),
        }
    n = {s: len(v[2]) for s, v in sets.items()}
    best = {name: best[name] for name in SECOND_GRID}
    return {"n": n, "rows": rows, "grid": grid, "best": best, "held_out": held_out}


def show(rows: list[dict]) -> None:
    frame = pd.DataFrame([{**row, **row["accuracy"]} for row in rows])
    hidden = ["accuracy", "gain_over_vote", "gain_over_zero_shot"]
    print(frame.drop(columns=hidden, errors="ignore").round(3).to_string(index=False))


def main(write: bool) -> None:
    """The tables; ``write`` stores them."""
    clip = models.load("mini")
    sets = load(clip, SUITE)
    table, again = first(sets), second(load(clip, SECOND))
    for part in (table, again):
        show(part["rows"])
        show(sorted(part["grid"], key=lambda row: -row["mean"])[:12])
    if write:
        about = {"model": "mini", "fingerprint": clip.fingerprint}
        about["n"] = {s: len(v[2]) for s, v in sets.items()}
        write_json(STORED, {"about": about} | table | {"parts_and_whole": again})


if __name__ == "__main__":
    main("--write" in sys.argv)
