"""Write ``imagenet.tsv``: synset, OpenAI's class name, and which variants have the class.

The names are those that open_clip ships (OpenAI's cleaned list, in the order of the sorted
synsets), the synsets and the class lists of ImageNet-A and -R those that timm ships. Before
writing, each name is compared with WordNet's words for its synset, which timm ships too: a list
that has slipped by one place would agree on a few of the thousand, not on nearly all.

Run it in the environment of the tests: ``python data/classnames/build.py``.
"""

import re
from importlib import resources
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES

HERE = Path(__file__).parent


def words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


def main() -> None:
    info = resources.files("timm.data") / "_info"
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    lemmas = dict(
        line.split("\t")
        for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    )
    variants = {v: (info / f"imagenet_{v}_synsets.txt").read_text().split() for v in "ar"}
    assert len(synsets) == len(IMAGENET_CLASSNAMES) == 1000 and synsets == sorted(synsets)
    assert all(len(v) == 200 and set(v) <= set(synsets) for v in variants.values())
    pairs = list(zip(synsets, IMAGENET_CLASSNAMES, strict=True))
    agree = sum(bool(words(name) & words(lemmas[synset])) for synset, name in pairs)
    print(f"{agree} of 1000 names share a word with WordNet's for the synset")
    assert agree > 950
    lines = [
        f"{synset}\t{name}\t{''.join(v for v in 'ar' if synset in variants[v])}"
        for synset, name in pairs
    ]
    (HERE / "imagenet.tsv").write_text("synset\tname\tvariants\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
