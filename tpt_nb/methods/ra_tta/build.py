"""Making an image database: of any folder, or of IconShift scenes."""

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from tpt_nb.core.files import only_writer, write_json, write_whole
from tpt_nb.core.images import EXTENSIONS, as_rgb, read_rgb
from tpt_nb.core.messages import bar
from tpt_nb.core.paths import cache_dir
from tpt_nb.datasets import iconshift, image_files
from tpt_nb.methods.ra_tta.database import Database, read_database
from tpt_nb.models import Clip
from tpt_nb.views import center_view

FORMAT = 1  # of stored databases
PART = 512  # images that a killed build may lose
FIRST = 40_000_000  # of iconshift-train: far from the scenes that MiniCLIP and CoOp learned from
PER_STYLE = 1820  # 11 styles: 20,020 images, of which one of a style sees the 18,200 of the others


@dataclass(frozen=True)
class Pictures:
    """Images to be embedded: names, how to get one, what they are, groups of neighbouring rows."""

    items: list[str]
    fetch: Callable
    fingerprint: str
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def database_spec(item: str) -> dict:
    """Parameters (see ``iconshift.spec``) of the scene "style/index" of the embedded database.

    They are those of ``iconshift-train`` (its photographs are not those of the test variants) far
    behind the scenes that were trained on; the sprite is that of the style.
    """
    style, _, index = item.rpartition("/")
    known = list(iconshift.styles())
    if style not in known:
        raise ValueError(f"{item!r} is no scene of the database: {style!r} is no IconShift style.")
    # every style has scenes of its own, not the same ones painted in another style
    place = FIRST + known.index(style) * 1_000_000 + int(index)
    return {**iconshift.spec("iconshift-train", place), "style": style}


def database_scene(item: str, size: int = 128):
    """The scene "style/index" of the embedded database, as a PIL image of ``size`` pixels."""
    return iconshift.compose(database_spec(item), size)


def style_of(image_id: str) -> str | None:
    """Drawing style of an IconShift test image ("iconshift-r/00012"), None for other images."""
    variant, _, number = image_id.rpartition("/")
    if variant not in iconshift.VARIANTS:
        return None
    kept = iconshift.kept(variant)
    return iconshift.spec(variant, int(number) if kept is None else kept[int(number)])["style"]


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
    text = f"{iconshift.fingerprint('iconshift-train')} {FIRST} {items}"
    return Pictures(items, database_scene, _hash(text.encode())[:16], groups)


def folder_pictures(root: str | Path) -> Pictures:
    """All images below a folder, in any arrangement, without labels. ``ValueError`` if none."""
    root, paths = Path(root), image_files(root)
    if not paths:
        raise ValueError(f"there is no image below {root}; known: {', '.join(EXTENSIONS)}")
    sizes = [path.stat().st_size if path.exists() else -1 for path in paths]  # -1: a dead link
    names = [path.relative_to(root).as_posix() for path in paths]
    text = "".join(f"{name}\0{size}\n" for name, size in zip(names, sizes, strict=True))
    text = text.encode(errors="surrogateescape")
    return Pictures([str(p) for p in paths], read_rgb, _hash(text)[:16])


def build(pictures: Pictures, clip: Clip, folder: str | Path, progress: bool = True) -> Database:
    """Embed pictures (as view 0: shorter side, centre crop) into a database folder, or read it.

    Embedded in parts that are kept: a run that was killed goes on where it was. Images that cannot
    be read are left out, with a warning, and listed in ``about.json``.

    Raises:
        ValueError: the folder holds another database; no image could be read.
    """
    about = {"format": FORMAT, "model": clip.fingerprint, "pictures": pictures.fingerprint}
    about["device"], path = clip.device.type, Path(folder) / "about.json"
    if not path.is_file():
        with only_writer(path.parent):
            if not path.is_file():  # made by the process that was waited for
                _embed(pictures, clip, path.parent, about, progress)
    made = read_database(folder)
    there = json.loads(path.read_text("utf-8"))
    if any(there.get(k) != v for k, v in about.items()):
        raise ValueError(
            f"{folder} holds a database of other images or of another model; delete it, or "
            "choose another folder."
        )
    return made


def _embed(pictures: Pictures, clip: Clip, folder: Path, about: Mapping, progress: bool) -> None:
    n = len(pictures.items)
    key, parts = _hash(json.dumps(about, sort_keys=True).encode())[:20], []
    with bar(n, 0, "embed the database", progress) as shown:
        for start in range(0, n, PART):
            chosen = range(start, min(start + PART, n))
            path = folder / f"part-{key}-{start:09d}.npz"
            if not path.is_file():
                _write_part(path, pictures, chosen, clip)
            with np.load(path) as part:
                parts.append([part[name] for name in ("rows", "features", "failed")])
            shown.update(len(chosen))
    rows, features, failed = (np.concatenate(some) for some in zip(*parts, strict=True))
    if not len(rows):
        raise ValueError(f"none of the {n} images could be read: {failed[0]}")
    if len(failed):
        warnings.warn(f"{len(failed)} images left out, first {failed[0]}", stacklevel=3)
    spans = {k: np.searchsorted(rows, span).tolist() for k, span in pictures.groups.items()}
    about = {**about, "groups": spans, "failed": failed.tolist()}
    write_database(folder, features, [pictures.items[i] for i in rows], about)
    for path in folder.glob("part-*.npz"):
        path.unlink()


def _write_part(path: Path, pictures: Pictures, rows: range, clip: Clip) -> None:
    views, good, failed = [], [], []
    for i in rows:
        try:
            image = as_rgb(pictures.fetch(pictures.items[i]))
        except Exception as error:  # whatever a decoder raises at a damaged file
            failed.append(f"{pictures.items[i]}: {type(error).__name__}: {error}")
            continue
        views.append(np.array(center_view(image, clip.image_size)))
        good.append(i)
    pixels = torch.from_numpy(np.array(views, np.uint8).reshape(-1, *[clip.image_size] * 2, 3))
    features = clip.encode_views(pixels.permute(0, 3, 1, 2)).cpu().numpy().astype(np.float16)
    data = io.BytesIO()
    np.savez(data, rows=np.array(good, int), features=features, failed=np.array(failed, str))
    write_whole(path, data.getvalue())


def write_database(
    folder: Path, features: np.ndarray, items: Sequence[str], about: Mapping
) -> None:
    """``vectors.safetensors``, ``items.json``, and ``about.json`` last: with it, it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "vectors.safetensors", save({"embedding": np.ascontiguousarray(features)}))
    write_json(folder / "items.json", list(items))
    write_json(folder / "about.json", {"n": len(features), "groups": {}, **about})


def embedded_database(
    clip: Clip, per_style: int = PER_STYLE, cache: str | Path | None = None, progress: bool = True
) -> Database:
    """The database of IconShift scenes for a model, from the cache or made now."""
    pictures = iconshift_pictures(per_style)
    name = f"{clip.name.replace('/', '-')}-{clip.fingerprint}-{clip.device.type}"
    folder = Path(cache or cache_dir()) / "databases" / f"{name}-{pictures.fingerprint}"
    return build(pictures, clip, folder, progress)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
