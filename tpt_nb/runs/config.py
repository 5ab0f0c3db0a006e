"""A run's configuration: what every run has, and a method with its options.

The flat names of the study ("TPT with patches") are accepted at the door, by
:meth:`RunConfig.from_dict`, and translated there once.
"""

import dataclasses
import hashlib
import json
import re
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tpt_nb import datasets, methods, views
from tpt_nb.core.files import sha256
from tpt_nb.core.messages import unknown
from tpt_nb.core.paths import DATA
from tpt_nb.methods.method import (
    at_least,
    check_type,
    check_value,
    flat_name,
    fraction,
    option,
    read_options,
)

GROUP = 32  # images adapted together; part of what a record depends on (in the last bits)
VERSION = 2  # of the records; raise it when the same configuration gives other records
VIEWS = ("augmenter", "n_aug", "n_patches", "overlap", "crop_side", "augmix", "augmix_ops")
VIEWS += ("severity", "autoaugment")
# these do not change what is computed, so runs that differ in them only are the same run
NOT_IDENTITY = ("profile", "out", "run_name", "tensorboard", "workers", "cache")
SHORT = {  # in names of runs, as the study has them
    "n_aug": "naug",
    "n_patches": "npatch",
    "rho": "spall",
    "rho_patch": "sppat",
    "reduced_size": "size",
    "class_token_position": "position",
}


@dataclass
class RunConfig:
    """One run. ``None`` and "auto" are filled in by ``runs.resolve``.

    Every field is an option of ``python -m tpt_nb evaluate`` and can be a papermill parameter.
    ``options`` are those of the method, by their own names.
    """

    dataset: str = option("auto", "data set: iconshift-a, ..., or folder (with root)")
    root: str = option("", "folder of the images, for data sets that are not embedded")
    classnames: str = option("", "other class names: study, or a file (known<tab>new, or a list)")
    embeddings: str = option(
        "", "features of others in place of pictures: test_embedding of RA-TTA"
    )
    model: str = option("auto", "mini, an OpenAI CLIP (RN50 ...), model@tag of open_clip, a file")
    profile: str = option(
        "auto",
        "full (RN50, ImageNet-A), mini (embedded), auto: what is there",
        choices=("auto", "full", "mini"),
    )
    method: str = option("tpt", "zero_shot (looks at the image only), confident_view, tpt ...")
    options: dict = field(default_factory=dict)
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: cuda where there is one")
    ctx_init: str = option(
        "a photo of a", "words that start the context, [CLS]: the name; '' for n_ctx"
    )
    n_ctx: int | None = at_least(1, None, "context tokens; without ctx_init they start at random")
    coop: str = option(
        "", "CoOp checkpoint to start from: a file, mini (embedded), auto (that of the model)"
    )
    class_token_position: str = option(
        "end",
        "of the class name: end, middle or front (start); [CLS] in ctx_init says it too",
        choices=("end", "middle", "front"),
        aliases={"start": "front"},
    )
    csc: bool = option(False, "class-specific context: a context for each class")
    templates: str = option(
        "",
        "single, seven, eighty or dataset: sentences, no context",
        choices=("", "single", "seven", "eighty", "dataset"),
    )
    augmenter: str = option(
        "random",
        "how views are made: random (crops, as in TPT), patch",
        choices=lambda: list(views.AUGMENTERS),
        aliases={"AugmenterTPT": "random", "PatchAugmenter": "patch"},
    )
    n_aug: int = at_least(0, 63, "augmented views of an image (and of each patch)")
    n_patches: int = at_least(0, 0, "patches of an image (patch): the largest square up to this")
    overlap: float = option(
        0.0,
        "of the patches, a fraction of their side on each side, 0 to 1",
        holds=lambda x: 0 <= x <= 1,
        allowed="from 0 (patches touch) to 1 (each grows by itself)",
    )
    crop_side: float | None = fraction(
        None,
        "side of random crops, in (0, 1] of the image's",
        allowed="a fraction in (0, 1], or nothing for TPT's crops",
    )
    augmix: bool = option(False, "AugMix on the views")
    augmix_ops: str = option(
        "tpt", "operations of AugMix: tpt or torchvision", choices=("tpt", "torchvision")
    )
    severity: int = option(
        1,
        "severity of AugMix, 1 to 10",
        holds=lambda x: 1 <= x <= 10,
        allowed="a whole number from 1 to 10",
    )
    autoaugment: bool = option(False, "AutoAugment on the views")
    reduced_size: int | None = option(
        None,
        "number of images (class-balanced); 0: all",
        holds=lambda x: x >= 0,
        allowed="a number of images, 0 or nothing for all",
    )
    subset_seed: int = option(0, "which images reduced_size takes")
    seed: int = option(0, "of the views")
    out: str = option("runs", "folder of the runs")
    run_name: str = option("", "put in front of the name of the run")
    tensorboard: bool = option(False, "write TensorBoard events too")
    workers: int | None = at_least(0, None, "processes that make views; changes no result")
    cache: str = option("", "folder of cached features; default: $TPT_NB_CACHE or ~/.cache/tpt_nb")

    @classmethod
    def from_dict(cls, values: Mapping) -> "RunConfig":
        """From a dict of parameters, those of the method among them, flat or under "options".

        Raises ``ValueError`` for an unknown key, with the closest known one.
        """
        common = {f.name for f in dataclasses.fields(cls)} - {"options"}
        own = option_names()
        out = {name: value for name, value in values.items() if name in common}
        chosen = dict(values.get("options") or {})
        chosen |= _from_text(values.get("params") or "")
        for name, value in values.items():
            if name in common or name in ("options", "params"):
                continue
            if name not in own:
                raise ValueError(unknown("parameter", name, [*sorted(common), *own]))
            if value is not None and value != "":  # nothing given: the method's default
                chosen[own[name]] = value
        method = out.get("method", "tpt")
        if isinstance(method, str):
            out["method"], more = methods.translate(method)
            chosen = more | chosen
        return cls(**out, options=chosen)

    def replace(self, **changes) -> "RunConfig":
        """The same with other values, flat ones too: ``config.replace(method="vote")``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options = dict(self.options)
        if changes.get("method", self.method) != self.method:
            # what was left at this method's default is for the other one to choose
            for f in option_fields(self.method).values():
                if not f.metadata["shared"] and options.get(f.name) == f.default:
                    options.pop(f.name, None)
        options |= dict(changes.pop("options", None) or {})
        return RunConfig.from_dict(values | {"options": options} | changes)

    @property
    def groups(self) -> tuple[int, int]:
        """How the views of an image lie: so many patches, so many views of each."""
        with warnings.catch_warnings():  # the run itself says what is odd, once
            warnings.simplefilter("ignore")
            return augmenter_of(self, 32).groups


def option_names() -> dict[str, str]:
    """Flat (and own) names of all options of all methods -> own names."""
    fields = [f for name in methods.names() for f in option_fields(name).values()]
    return {flat_name(f): f.name for f in fields} | {f.name: f.name for f in fields}


def option_fields(method: str) -> dict[str, dataclasses.Field]:
    """The fields of a method's options by their own names."""
    return {f.name: f for f in dataclasses.fields(methods.get(method).options)}


def _from_text(text: str) -> dict:
    """``lambda_q=4,lambda_y=0.2`` as a dict; values are read as JSON where they can be."""
    out = {}
    for part in filter(None, str(text).replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out


def check(config: RunConfig) -> None:
    """Raise ``ValueError`` with what was received and what is allowed, for the first bad value."""
    hints = typing.get_type_hints(RunConfig)
    for f in dataclasses.fields(RunConfig):
        value = getattr(config, f.name)
        check_type(f.name, value, hints[f.name])
        if f.metadata:
            check_value(f.name, f.metadata["aliases"].get(value, value) if isinstance(value, str)
                        else value, f.metadata)  # fmt: skip
    methods.get(config.method)
    if config.templates and config.coop:
        raise ValueError("templates and coop are both given; choose one of the two prompts.")
    if not (config.ctx_init or config.n_ctx or config.coop):
        raise ValueError("ctx_init is empty: say how many context tokens to draw with n_ctx.")
    augmenter = views.AUGMENTERS.get(config.augmenter)
    takes = {f.name for f in dataclasses.fields(augmenter)} if augmenter else set(VIEWS)
    usual = RunConfig()
    for name in ("n_patches", "overlap", "crop_side", "autoaugment"):
        value = getattr(config, name)
        if name not in takes and value != getattr(usual, name):
            fit = [n for n, a in views.AUGMENTERS.items() if name in a.__dataclass_fields__]
            raise ValueError(
                f"{name}={value!r} means nothing to augmenter {config.augmenter!r}; it is for "
                f"{', '.join(fit)}."
            )


def options_of(config: RunConfig):
    """The options of the configuration's method, checked; what only others have is refused.

    Options that the study gives to all its methods (``shared``: selection ratio, learning rate and
    so on) are left out where a method has no use for them.
    """
    mine = option_fields(config.method)
    others: dict[str, list[str]] = {}
    about: dict[str, dataclasses.Field] = {}
    usual: dict[str, list] = {}  # methods may give one name different defaults
    for name in methods.names():
        for f in option_fields(name).values():
            others.setdefault(f.name, []).append(name)
            usual.setdefault(f.name, []).append(f.default)
            about[f.name] = about.get(f.name, f) if about.get(f.name, f).metadata["shared"] else f
    values = {}
    for name, value in config.options.items():
        if name in mine:
            values[flat_name(mine[name])] = value
        elif name not in others:
            known = [flat_name(f) for f in mine.values()]
            raise ValueError(
                unknown(f"option of {config.method}", name, known)
                if known
                else f"{name}={value!r}: {config.method} takes no options."
            )
        elif not about[name].metadata["shared"] and value not in usual[name]:
            fit = " or ".join(map(repr, others[name]))
            raise ValueError(f"{flat_name(about[name])}={value!r} is for method {fit}, not "
                             f"{config.method!r}.")  # fmt: skip
    return read_options(methods.get(config.method), values, outside=True)


def augmenter_of(config: RunConfig, size: int):
    """The augmenter of a configuration, with views of ``size`` pixels."""
    fields = views.AUGMENTERS[config.augmenter].__dataclass_fields__
    values = {name: getattr(config, name) for name in VIEWS if name in fields}
    return views.make_augmenter(config.augmenter, size=size, **values)


# --- identity and name ---------------------------------------------------------------------------


def identity(resolved: RunConfig) -> dict:
    """Everything in a filled-in configuration that the records depend on.

    Local weights count by their content: a model that was trained again makes another run.
    """
    values = dataclasses.asdict(resolved)
    for name in NOT_IDENTITY:
        del values[name]
    values["device"] = resolved.device.split(":")[0]
    files = {"coop": resolved.coop, "model": resolved.model, "embeddings": resolved.embeddings}
    if resolved.classnames:
        files["classnames"] = str(datasets.wording_file(resolved.classnames))
    for name in ("classnames", "embeddings"):  # a run without them is what it was before
        if not values[name]:
            del values[name]
    if resolved.model == "mini":
        files["model"] = str(DATA / "miniclip" / "miniclip.safetensors")
    for name, path in files.items():
        if path and Path(path).is_file():
            values[name] = [Path(path).name, sha256(path)]
    method = methods.get(resolved.method)
    if method.identity:
        values |= method.identity(options_of(resolved), resolved)
    return {"version": VERSION, "group": GROUP, **values}


def name_of(resolved: RunConfig) -> str:
    """Data set, model, method, then what differs from the defaults, then a short hash.

    For example ``iconshift-a_mini_tpt_naug=31_size=500_1a2b3c4d``.
    """
    usual = dataclasses.asdict(RunConfig()) | {"device": "cpu"}
    method = methods.get(resolved.method)
    if method.views == "first":
        usual["n_aug"] = 0
    plain = method.options()
    plain = method.resolve(plain, resolved) if method.resolve else plain
    usual_options = dataclasses.asdict(plain)
    model = resolved.model
    parts = [resolved.run_name] if resolved.run_name else []
    parts += [resolved.dataset, Path(model).stem if Path(model).is_file() else model]
    parts.append(resolved.method)
    skip = (*NOT_IDENTITY, "dataset", "model", "method", "options")
    found = [(k, getattr(resolved, k), v) for k, v in usual.items() if k not in skip]
    found += [(k, v, usual_options.get(k)) for k, v in resolved.options.items()]
    for name, value, default in found:
        if value == default:
            continue
        if isinstance(value, str) and ("/" in value or "\\" in value):
            value = Path(value).name.split(".")[0]
        elif name == "device":
            value = value.split(":")[0]
        value = f"{value:g}" if isinstance(value, float) else value
        parts.append(f"{SHORT.get(name, name)}={value}")
    text = re.sub(r"[^\w.=+-]+", "-", "_".join(parts))
    text = text.encode()[:150].decode(errors="ignore")  # file systems count bytes
    return f"{text}_{short_hash(identity(resolved))}"


def short_hash(values: Mapping) -> str:
    """Eight hexadecimal digits of a dict."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def describe(resolved: RunConfig) -> str:
    """The settings of a run in a few words, for people: printed before it starts."""
    values = dataclasses.asdict(resolved)
    options = values.pop("options")
    usual = dataclasses.asdict(RunConfig())
    shown = ("dataset", "model", "device", "augmenter", "n_aug", "seed", "reduced_size")
    first = [f"{k}={v}" for k, v in values.items() if k in shown]
    first += [
        f"{k}={v}"
        for k, v in values.items()
        if k not in (*shown, *NOT_IDENTITY, "method") and v != usual[k]
    ]
    return (
        f"{resolved.method}({', '.join(f'{k}={v}' for k, v in options.items())}) on "
        + ", ".join(first)
    )
