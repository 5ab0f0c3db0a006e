"""Image databases without labels: embed them, keep them on disk, search them.

A database is a folder: ``vectors.safetensors`` (float16, read as a memory map), ``items.txt`` (the
names of the images) and ``about.json``. ``build`` makes one from any pictures, ``read_database``
reads it, or a file of embeddings that the authors of RA-TTA publish. Searches are exact, with faiss
or without; beyond a million vectors faiss has approximate ones, and ``recall`` says what they miss.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tpt_nb.core.paths import cache_dir
from tpt_nb.datasets import iconshift
from tpt_nb.methods.ra_tta.database import FORMAT, Database, read_database
from tpt_nb.models import Clip

FIRST = 40_000_000  # of iconshift-train: far from the scenes that MiniCLIP and CoOp learned from


PER_STYLE = 1820  # 11 styles: 20,020 images, of which one of a style sees the 18,200 of the others


@dataclass(frozen=True)
class Pictures:
    """Images to be embedded: names, how to get one, groups of neighbouring rows, what they are."""

    items: list[str]
    fetch: Callable
    groups: dict[str, tuple[int, int]]
    fingerprint: str


def database_scene(item: str, size: int = 128):
    """The scene "style/index" of the embedded database, as a PIL image of ``size`` pixels.

    Parameters are those of ``iconshift-train`` (its photographs are not those of the test variants)
    far behind the scenes that were trained on; the sprite is that of the style.
    """
    return iconshift.compose(database_spec(item), size)


def database_spec(item: str) -> dict:
    """Parameters of a scene of the embedded database (see ``iconshift.spec``)."""
    style, _, index = item.rpartition("/")
    if style not in iconshift.styles():
        raise ValueError(f"{item!r} is no scene of the database: {style!r} is no IconShift style.")
    known = list(iconshift.styles())
    # every style has scenes of its own, not the same ones painted in another style
    place = FIRST + known.index(style) * 1_000_000 + int(index)
    return {**iconshift.spec("iconshift-train", place), "style": style}


def iconshift_pictures(per_style: int = PER_STYLE) -> Pictures:
    """``per_style`` scenes of each of the eleven IconShift styles, classes in turn."""
    items, groups = [], {}
    classes = len(iconshift.classnames())
    for style, about in iconshift.styles().items():
        drawn = [c for c in range(classes) if c not in about["missing"]]
        start = len(items)
        rounds = -(-per_style // len(drawn))
        indices = [r * classes + c for r in range(rounds) for c in drawn][:per_style]
        items += [f"{style}/{i:06d}" for i in indices]
        groups[style] = (start, len(items))
    print_ = hashlib.sha256(
        f"{iconshift.fingerprint('iconshift-train')} {FIRST} {items}".encode()
    ).hexdigest()
    return Pictures(items, database_scene, groups, print_[:16])


def folder_pictures(root: str | Path) -> Pictures:
    """All images below a folder, in any arrangement, without labels. ``ValueError`` if none."""
    from tpt_nb.core.images import EXTENSIONS, read_rgb

    root = Path(root)
    paths = sorted(
        p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.name[0] != "."
    )
    if not paths:
        raise ValueError(f"there is no image below {root}; known: {', '.join(EXTENSIONS)}")
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n".encode())
    return Pictures([str(p) for p in paths], read_rgb, {}, digest.hexdigest()[:16])


def style_of(image_id: str) -> str | None:
    """Drawing style of an IconShift test image ("iconshift-r/00012"), None for other images."""
    variant, _, number = image_id.rpartition("/")
    if variant not in iconshift.VARIANTS:
        return None
    indices = iconshift.kept(variant)
    return iconshift.spec(variant, int(number) if indices is None else indices[int(number)])[
        "style"
    ]


def build(
    pictures: Pictures, clip: Clip, folder: str | Path | None = None, progress: bool = True
) -> Database:
    """Embed pictures (as view 0: shorter side, centre crop) into a database folder, or read it.

    Embedded in parts of 512 that are kept: a run that was killed goes on where it was. Images that
    cannot be decoded are left out, with a warning, and listed in ``about.json``.

    Args:
        folder: where it is kept; None for a place in the cache that the content names.
    Raises:
        ValueError: the folder holds another database; no image could be read.
    """
    from tqdm import tqdm

    about = {"format": FORMAT, "model": clip.fingerprint, "pictures": pictures.fingerprint}
    about["device"] = clip.device.type
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(folder) if folder else cache_dir() / "databases" / key
    path = folder / "about.json"
    if path.is_file():
        there = json.loads(path.read_text())
        if any(there.get(k) != v for k, v in about.items()):
            raise ValueError(
                f"{folder} holds a database of other images or of another model; delete it, or "
                "choose another folder."
            )
        return read_database(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size, parts, failed = 512, [], []
    starts = range(0, len(pictures.items), size)
    hidden = None if progress and not os.environ.get("TQDM_DISABLE") else True
    for start in tqdm(starts, desc="embed the database", unit="part", disable=hidden):
        part = folder / f"part-{key}-{start:09d}.npz"
        if not part.is_file():
            _write_part(part, pictures, range(start, min(start + size, len(pictures.items))), clip)
        with np.load(part) as loaded:
            parts.append((loaded["rows"], loaded["features"]))
            failed += loaded["failed"].tolist()
    rows = np.concatenate([r for r, _ in parts])
    if not len(rows):
        raise ValueError(f"none of the {len(pictures.items)} images could be read: {failed[0]}")
    if failed:
        warnings.warn(f"{len(failed)} images left out, first {failed[0]}", stacklevel=2)
    features = np.concatenate([f for _, f in parts])
    groups = {
        name: [int(x) for x in np.searchsorted(rows, span)]
        for name, span in pictures.groups.items()
    }
    about |= {"groups": groups, "failed": failed}
    write_database(folder, features, [pictures.items[i] for i in rows], about)
    for part in folder.glob("part-*.npz"):
        part.unlink()
    return read_database(folder)


def _write_part(path: Path, pictures: Pictures, rows: range, clip: Clip) -> None:
    from tpt_nb.core.images import as_rgb
    from tpt_nb.views import center_view

    views, good, failed = [], [], []
    for i in rows:
        try:
            view = center_view(as_rgb(pictures.fetch(pictures.items[i])), clip.image_size)
        except Exception as error:
            failed.append(f"{pictures.items[i]}: {type(error).__name__}: {error}")
            continue
        views.append(np.asarray(view))
        good.append(i)
    features = np.zeros((0, clip.embed_dim), np.float16)
    if views:
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
        features = clip.encode_views(pixels).cpu().numpy().astype(np.float16)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, rows=np.array(good, int), features=features, failed=np.array(failed, str))
    os.replace(temporary, path)


def write_database(folder: Path, features: np.ndarray, items: list[str], about: Mapping) -> None:
    """``vectors.safetensors``, ``items.txt``, and ``about.json`` last: with it, it is complete."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"embedding": np.ascontiguousarray(features)}, folder / "vectors.safetensors")
    (folder / "items.txt").write_text("".join(f"{item}\n" for item in items), "utf-8")
    temporary = folder / "about.json.tmp"
    temporary.write_text(json.dumps({"n": len(features), **about}, indent=1) + "\n")
    os.replace(temporary, folder / "about.json")


def embedded_database(
    clip: Clip, per_style: int = PER_STYLE, cache: str | Path | None = None, progress: bool = True
) -> Database:
    """The database of IconShift scenes for a model, from the cache or made now."""
    pictures = iconshift_pictures(per_style)
    name = f"{clip.name.replace('/', '-')}-{clip.fingerprint}-{clip.device.type}"
    folder = Path(cache or cache_dir()) / "databases" / f"{name}-{pictures.fingerprint}"
    return build(pictures, clip, folder, progress)
