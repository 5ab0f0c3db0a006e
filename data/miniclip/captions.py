"""Captions for training scenes: what is true of an image, and sentences that say some of it.

A *fact* is a word that is true or false of an image (``small``, ``cartoon``, ``striped`` ...). A
caption names the class and a few facts; it is a positive for every image of the class for which all
its facts hold.
"""

import numpy as np

STYLE_WORDS = {
    "noto": "drawing",
    "noto-v1": "cartoon",
    "twemoji": "sticker",
    "emojione": "emoji",
    "fluent-emoji-flat": "flat icon",
}
TREATMENTS = ("natural", "gray", "inverted", "blurry", "dark", "bright", "stencil", "outline")
TREATMENT_WORDS = {
    "gray": ("gray", "black and white"),
    "inverted": ("inverted", "negative"),
    "blurry": ("blurry", "low resolution"),
    "dark": ("dark",),
    "bright": ("bright",),
    "stencil": ("stencil", "sketch"),
    "outline": ("outlined", "line art"),
}
SIZES = ("tiny", "small", "large", "huge")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the center",
}
TEXTURES = ("plain", "gradient", "striped", "checkered", "noisy", "photo")
TEXTURE_WORDS = {"photo": "textured"}
EXTRA = ("tilted", "cluttered", "colored", "bad")
FACTS = (
    *STYLE_WORDS, *TREATMENTS[1:], *SIZES, *PLACES, *TEXTURES, *EXTRA
)  # fmt: skip
INDEX = {fact: i for i, fact in enumerate(FACTS)}
# true of every image; the first is CLIP's own prompt and gets the largest share
NEUTRAL = (
    ["a photo of a {}."] * 10
    + ["a photo of the {}."] * 2
    + ["a picture of a {}.", "an image of a {}.", "a {}.", "{}", "a photo of a {}", "one {}."]
    + ["itap of a {}.", "art of the {}.", "a {} in a video game.", "a origami {}.", "my {}."]
    + ["a photo of one {}.", "a good photo of the {}.", "this is a {}.", "there is a {}."]
)
NOUNS = ("photo", "photo", "photo", "picture", "image")


def facts(
    style: str, treatment: str, side: float, x: float, y: float, texture: str, angle: int,
    clutter: int, tinted: bool,
) -> np.ndarray:  # fmt: skip
    """Truth of every fact for one image, bool ``[len(FACTS)]``.

    ``side`` is the object's side as a share of the image's, ``x`` and ``y`` its centre in [0,1].
    """
    true = {style, texture}
    if treatment != "natural":
        true.add(treatment)
    if treatment in ("blurry", "dark"):
        true.add("bad")
    for word, holds in (
        ("tiny", side < 0.38), ("small", side < 0.5), ("large", side > 0.72), ("huge", side > 0.95),
        ("left", x < 0.38), ("right", x > 0.62), ("top", y < 0.38), ("bottom", y > 0.62),
        ("middle", abs(x - 0.5) < 0.1 and abs(y - 0.5) < 0.1),
        ("tilted", abs(angle) > 12), ("cluttered", clutter > 1),
        ("colored", tinted and treatment not in ("gray", "stencil", "outline")),
    ):  # fmt: skip
        if holds:
            true.add(word)
    out = np.zeros(len(FACTS), bool)
    out[[INDEX[f] for f in true]] = True
    return out


def caption(name: str, true: np.ndarray, rng: np.random.Generator) -> tuple[str, list[int]]:
    """A sentence about an image of class ``name`` with facts ``true``, and the facts it states."""
    if rng.random() < 0.35:
        return NEUTRAL[rng.integers(len(NEUTRAL))].format(name), []
    holds = [f for f in FACTS if true[INDEX[f]]]

    def pick(options, p):
        options = [f for f in holds if f in options]
        return options[rng.integers(len(options))] if options and rng.random() < p else None

    size, place = pick(SIZES, 0.5), pick(PLACES, 0.25)
    treatment, texture = pick(TREATMENTS, 0.6), pick(TEXTURES, 0.25)
    style, extra = pick(STYLE_WORDS, 0.4), pick(EXTRA, 0.2)
    adjectives = []
    if extra:
        adjectives.append(extra)
    if treatment:
        words = TREATMENT_WORDS[treatment]
        adjectives.append(words[rng.integers(len(words))])
    noun = STYLE_WORDS[style] if style else NOUNS[rng.integers(len(NOUNS))]
    inner = ""
    if size:
        if rng.random() < 0.5:
            adjectives.append(size)
        else:
            inner = size + " "
    the = "the" if rng.random() < 0.2 else "a"
    text = " ".join(["a", *adjectives, noun, "of", the]) + f" {inner}{name}"
    if place:
        phrase = PLACES[place]
        text = f"{phrase}, {text}" if rng.random() < 0.5 else f"{text} {phrase}"
    if texture:
        phrase = f"{TEXTURE_WORDS.get(texture, texture)} background"
        text = f"{phrase}, {text}" if rng.random() < 0.7 else f"{text}, {phrase}"
    stated = [size, place, treatment, texture, style, extra]
    return text + ("." if rng.random() < 0.8 else ""), [INDEX[f] for f in stated if f]


def vocabulary(names: list[str]) -> list[str]:
    """Sentences that between them hold every word a caption can hold."""
    words = [w for options in TREATMENT_WORDS.values() for w in options]
    words += [*STYLE_WORDS.values(), *SIZES, *PLACES.values(), *TEXTURES, *TEXTURE_WORDS.values()]
    words += [*EXTRA, *NOUNS, "a the of background, ."]
    sentences = [t.format(n) for n in names for t in ("{}", "{}.", "a {}, the x.")]
    return sentences + words + [w + "." for w in words] + [t.format("x") for t in NEUTRAL]
