"""What notebook 06 needs beside its teaching cells: the generator, sheets of variations, controls.

Nothing here adapts anything; the methods are in ``methods.difftpt``.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tpt_nb import datasets, features, runs, views
from tpt_nb.core.paths import cache_dir
from tpt_nb.methods import difftpt

KEPT = 0.8  # the share of the variations that DiffTPT's first filter keeps


def choose(generator: str, **asked) -> str:
    """The generator of a notebook: "auto" is the embedded one in mini, the paper's in full.

    ``asked``: profile, model, dataset and root, as in the notebook's parameters.
    """
    if generator != "auto":
        return generator
    profile, _ = runs.choose_profile(runs.RunConfig(**asked), lacking=lacking(generator))
    return "mini" if profile == "mini" else difftpt.PAPER


def lacking(generator: str) -> str:
    """What "auto" lacks for full, in words: the paper's pictures, which nobody makes on a guess.

    Empty if a generator is named, or if pictures by the paper's are in the cache (of other images,
    perhaps: ``variations`` looks at each).
    """
    dataset, _ = runs.PROFILES["full"]
    made = cache_dir() / "generated"
    if generator != "auto" or any(made.glob(f"{dataset}-*/manifest.json")):
        return ""
    return (
        f"{difftpt.PipelineGenerator.usual} pictures of each image by Stable Diffusion, which take "
        f"hours on a T4 (`python -m tpt_nb generate --dataset {dataset} --reduced_size 60 "
        f"--generator {difftpt.PAPER}` makes them, and goes on where it stopped)"
    )


def variations(world):
    """Pictures of each image: the embedded generator makes those that are not there, now.

    Raises:
        ValueError: another generator's pictures are missing; the message says how to make them.
    """
    options, cache = runs.options_of(world.config), world.config.cache
    maker = difftpt.load_generator(options.generator, world.config.device)
    if isinstance(maker, difftpt.MiniGenerator):
        return difftpt.generate(world.images, maker, options.n_generated, cache=cache)
    return difftpt.pictures_for(options, world.config, world.images)


def sheet(
    image, label: str, made: Sequence, near: Tensor, seen: Sequence[str]
) -> tuple[list[tuple], int]:
    """Two rows for ``figures.image_grid``: an image, then its variations, most similar first.

    Args:
        made: G pictures; ``near`` ``[G]`` their cosines with the image, ``seen`` their classes.
    Returns:
        (picture, title, frame) of each cell, blue for those that the filter keeps; and the number
        of cells in a row.
    """
    row = 1 + -(-min(len(made), 16) // 2)
    order = near.argsort(descending=True).tolist()
    stays = set(order[: int(KEPT * len(order))])
    cells = [(image, label, None)]
    for k in order[: 2 * (row - 1)]:
        cells.append((made[k], f"{near[k]:.2f}\n{seen[k]}", "blue" if k in stays else "orange"))
    cells.insert(row, (None, "", None))  # the second row begins under the variations
    return cells + [(None, "", None)] * (2 * row - len(cells)), row


def real_pictures(source, clip, classes: Sequence[int], count: int, cache=None) -> Tensor:
    """For each image ``count`` real pictures of a class, as features ``[N,count,D]``.

    Args:
        source: data set with the same classes, at least ``count`` images of each.
        classes: ``[N]``, the class whose pictures image i gets.
    """
    targets = np.asarray(source.targets)
    places = {c: np.flatnonzero(targets == c)[:count].tolist() for c in set(map(int, classes))}
    wanted = [i for some in places.values() for i in some]
    whole = views.make_augmenter("random", size=clip.image_size, n_aug=0)
    part = datasets.subset(source, wanted)
    found = features.encode(part, clip, whole, seed=0, cache=cache).features[:, 0]
    row = {i: k for k, i in enumerate(wanted)}
    return torch.stack([found[[row[i] for i in places[int(c)]]] for c in classes])


def measure_steps(known, clip, text: Tensor, steps: int, count: int) -> tuple[dict, list]:
    """What the embedded generator makes of known images in so many steps.

    Args:
        known: images of a familiar style; ``text`` ``[C,D]`` are the features of its classes.
    Returns:
        Seconds a variation, class kept (%), cosine with the image, and distance of two variations
        (1 - cosine); and the first variation of each image.
    """
    maker = difftpt.load_generator(f"mini:steps={steps}")
    maker.make(known[0][0], [0])  # loaded and warm
    began = time.perf_counter()
    pairs = [(known[i][0], known.ids[i]) for i in range(len(known))]
    made = [difftpt.variations(image, count, maker, image_id=name) for image, name in pairs]
    seconds = (time.perf_counter() - began) / (count * len(known))
    kept, near, apart = [], [], []
    for (image, _), some, target in zip(pairs, made, known.targets, strict=True):
        f = clip.encode_views(difftpt.Row(count, clip.image_size)(difftpt.as_row(some))).cpu()
        whole = clip.encode_views(difftpt.Row(1, clip.image_size)(image)).cpu()
        kept.append(((f @ text.T).argmax(1) == target).float().mean())
        near.append((f @ whole.T).mean())
        apart.append((1 - f @ f.T).sum() / (count * (count - 1)))
    kept, near, apart = (float(torch.stack(v).mean()) for v in (kept, near, apart))
    line = {"seconds a variation": seconds, "class kept (%)": 100 * kept}
    line |= {"cosine with the image": near, "distance of two of them": apart}
    return line, [some[0] for some in made]
