"""CoOp's split files (``split_zhou_*.json``): labels and names that must agree with themselves."""

from collections.abc import Sequence
from pathlib import Path

from tpt_nb.core.files import read_json
from tpt_nb.datasets.folder import spelling
from tpt_nb.datasets.official import Items, number_off

Entry = tuple[str, int, str]  # path, label, class name


def from_split(path: Path, classes: int, folders: Sequence[Path]) -> tuple[list[str], Items]:
    """Names and test images of a split file: lists of [path, label, class name].

    Args:
        classes: how many there must be.
        folders: where the images may be.
    Raises ``ValueError`` if this is no split file, contradicts itself or has no images here.
    """
    split = read_json(path)
    try:
        entries = {part: [(str(p), int(y), str(c)) for p, y, c in split[part]] for part in split}
        test = entries["test"]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} is no split file ({type(error).__name__}: {error}); expected JSON with a list "
            '"test" of [path, label, class name]'
        ) from error
    everything = [entry for part in entries.values() for entry in part]
    if path.name == "split_Caltech256.json":
        test, everything = _caltech256(test, everything)
    if not test:
        raise ValueError(f"{path} has no test images")
    names = _consistent(path, everything, classes)
    # a few, since a single one may be missing
    inner = next((f for f in folders if any((f / p).exists() for p, _, _ in test[:20])), None)
    if inner is None:
        raise ValueError(
            f"{path} names the image {test[0][0]!r}, which is in none of "
            f"{', '.join(map(str, dict.fromkeys(folders)))}"
        )
    return names, [(p, label, inner / p) for p, label, _ in test]


def _consistent(path: Path, entries: list[Entry], classes: int) -> list[str]:
    """Names in label order; ``ValueError`` if a label, a name and a folder do not fit together."""
    names: dict[int, str] = {}
    labels: dict[str, set[int]] = {}  # two classes may have one name
    folders: dict[str, int] = {}
    bad = []
    for image, label, name in entries:
        if names.setdefault(label, name) != name:
            bad.append(f"label {label} is {names[label]!r} and {name!r} ({image})")
        labels.setdefault(spelling(name), set()).add(label)
        if "/" in image:
            folders.setdefault(image.rsplit("/", 1)[0], label)
    if len(folders) >= classes:  # class folders: they must say the same as the labels
        for image, label, name in entries:
            folder, found, _ = image.rpartition("/")
            if not found:
                bad.append(f"{image} has label {label} ({name!r}), but is in no class folder")
                continue
            spelt = labels.get(spelling(folder.rsplit("/", 1)[-1]), {label})
            if folders[folder] != label or label not in spelt:
                bad.append(f"{image} has label {label} ({name!r}), its folder says another class")
    if bad:
        shown = "\n".join(f"  {text}" for text in bad[:5])
        raise ValueError(f"{path} contradicts itself {len(bad)} times:\n{shown}")
    if sorted(names) != list(range(classes)):
        raise ValueError(
            f"{path} has {len(names)} classes with labels {min(names)} to {max(names)}; expected "
            f"{classes}, labelled 0 to {classes - 1}. Is it the split of another data set?"
        )
    return [names[label] for label in range(classes)]


def _caltech256(*parts: list[Entry]) -> tuple[list[Entry], ...]:
    """Without faces-easy, labels closed up, names without number and "-101"."""
    labels = sorted({y for _, y, name in parts[-1] if "faces-easy" not in name})
    rank = {label: i for i, label in enumerate(labels)}
    return tuple(
        [(p, rank[y], number_off(name)) for p, y, name in part if "faces-easy" not in name]
        for part in parts
    )
