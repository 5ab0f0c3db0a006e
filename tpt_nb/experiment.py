"""Runs: a configuration in, records and a summary out, on disk and resumable.

``run(RunConfig(...))`` encodes the images (stage 1, cached), adapts to each of them (stage 2) and
fills ``<out>/<run name>/``:

- ``config.json``: the configuration with every default filled in, and what it was run on;
- ``records.jsonl``: one line per image, in the order of the data set, flushed group by group;
- ``summary.json``: metrics with intervals, failed images, versions, device, seconds; written last;
- TensorBoard events on request, with the tags of the study "TPT with patches".

A run that was killed goes on where it stopped when it is started again, and leaves the records of
an undisturbed run: images are adapted in fixed groups of ``GROUP``, whatever was finished before,
so that every number comes from the same operations in the same order.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import platform
import re
import time
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tpt_nb.paths import DATA, cache_dir

GROUP = 32  # images adapted together; part of what a record depends on (in the last bits)
VERSION = 1  # of the records; raise it when the same configuration gives other records
PROFILES = {"full": ("imagenet-a", "RN50"), "mini": ("iconshift-a", "mini")}
ALIASES = {  # the study's names
    "loss": {"defaultTPT": "marginal_entropy"},
    "augmenter": {"AugmenterTPT": "random", "PatchAugmenter": "patch"},
}
DIFFUSION = ("difftpt", "difftpt_code", "difftpt_paper", "difftpt_vote")
OF_METHOD = {  # options that one method, or some, alone have
    "descriptions": "ra_tta",
    "database": "ra_tta",
    "transport": "ra_tta",
    "repairs": "caption_prompts",
    "captioner": "caption_prompts",
    "generator": DIFFUSION,
    "n_generated": DIFFUSION,
    "generator_seed": DIFFUSION,
}
RENAMED = {  # parameters of methods -> the study's names of them
    "rho": "selection_p_all",
    "lr": "learning_rate",
    "steps": "tta_steps",
    "alpha": "alpha_exponential_weightening",
}
ONE_VIEW = ("zero_shot", "caption_prompts")  # methods that look at the image only
# these do not change what is computed, so runs that differ in them only are the same run
NOT_IDENTITY = ("profile", "out", "run_name", "tensorboard", "workers", "cache")


def _option(default, text: str):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class RunConfig:
    """One run. Parameter names are those of the study where it has the parameter.

    ``None`` and "auto" are filled in by :func:`resolve`. Every field is an option of
    ``python -m tpt_nb evaluate`` and can be a papermill parameter.
    """

    dataset: str = _option("auto", "data set: iconshift-a, ..., or folder (with root)")
    root: str = _option("", "folder of the images, for data sets that are not embedded")
    model: str = _option("auto", "mini, an OpenAI CLIP (RN50 ...), model@tag of open_clip, a file")
    profile: str = _option("auto", "full (RN50, ImageNet-A), mini (embedded), auto: what is there")
    method: str = _option("tpt", "zero_shot (looks at the image only), confident_view, tpt ...")
    device: str = _option("auto", "cpu, cuda, cuda:1 ...; auto: cuda where there is one")
    ctx_init: str = _option("a photo of a", "words that the context starts from; '' for n_ctx")
    n_ctx: int | None = _option(None, "context tokens; without ctx_init they start at random")
    coop: str = _option("", "CoOp checkpoint to start from: a file, or mini for the embedded one")
    class_token_position: str = _option("end", "of the class name: end, middle or front")
    csc: bool = _option(False, "class-specific context: a context for each class")
    templates: str = _option("", "single, seven, eighty or dataset: sentences, no context")
    augmenter: str = _option("random", "how views are made: random (crops, as in TPT), patch")
    n_aug: int = _option(63, "augmented views of an image (and of each patch)")
    n_patches: int = _option(0, "patches of an image (patch): the largest square up to this")
    overlap: float = _option(0.0, "of the patches, a fraction of their side on each side, 0 to 1")
    crop_side: float | None = _option(None, "side of random crops, in (0,1] of the image's")
    augmix: bool = _option(False, "AugMix on the views")
    augmix_ops: str = _option("tpt", "operations of AugMix: tpt or torchvision")
    severity: int = _option(1, "severity of AugMix, 1 to 10")
    autoaugment: bool = _option(False, "AutoAugment on the views")
    loss: str = _option("marginal_entropy", "what the context is tuned for")
    learning_rate: float | None = _option(None, "default: 0.005, for mini that of its model card")
    tta_steps: int | None = _option(
        None, "optimiser steps per image; default: that of the method, TPT has 1"
    )
    optimizer: str = _option("adamw", "adamw or sgd, fresh for each image")
    selection_p_all: float | None = _option(
        None, "rho: fraction of the views kept, in (0,1]; default: that of the method, TPT has 0.1"
    )
    selection_p_patch: float = _option(0.9, "fraction kept within each patch, in (0,1]")
    alpha_exponential_weightening: float = _option(1.0, "alpha of the loss patch_loss6")
    exact: str = _option("fast", "fast; paper (77 tokens, image by image); tangent (approximates)")
    params: str = _option("", "what else the method takes, as lambda_q=4,lambda_y=0.2")
    descriptions: str = _option("", "file {class: [sentences]} of ra_tta; default: IconShift's")
    database: str = _option("", "image database of ra_tta: a folder of build-database, a file")
    transport: str = _option("entropic", "of ra_tta: entropic, exact, independent or mean")
    repairs: str = _option("none", "of caption_prompts: none, all, or some, as span+article")
    captioner: str = _option(
        "auto", "of caption_prompts: clip (retrieval with the model), vit-gpt2"
    )
    generator: str = _option(
        "mini", "of difftpt: mini, a diffusers pipeline (id@revision, folder), crops (the control)"
    )
    n_generated: int | None = _option(
        None, "generated views of an image; default: 16 by mini, 63 by a pipeline"
    )
    generator_seed: int = _option(0, "of the generated images")
    reduced_size: int | None = _option(None, "number of images (class-balanced); 0: all")
    subset_seed: int = _option(0, "which images reduced_size takes")
    seed: int = _option(0, "of the views")
    out: str = _option("runs", "folder of the runs")
    run_name: str = _option("", "put in front of the name of the run")
    tensorboard: bool = _option(False, "write TensorBoard events too")
    workers: int | None = _option(None, "processes that make views; changes no result")
    cache: str = _option("", "folder of cached features; default: $TPT_NB_CACHE or ~/.cache/tpt_nb")

    @classmethod
    def from_dict(cls, values: Mapping) -> "RunConfig":
        """From a dict of parameters; ``ValueError`` names unknown keys and the closest known."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(unknown("parameter", key, known))
        return cls(**values)


@dataclass
class Run:
    """A finished run: its folder, its configuration (all filled in), its records, its summary."""

    dir: Path
    config: RunConfig
    records: list[dict]
    summary: dict

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def frame(self):
        """The records as a ``pandas.DataFrame``."""
        from tpt_nb.metrics import frame

        return frame(self.records)


def unknown(what: str, got: object, known: typing.Iterable[str]) -> str:
    """Message for a name that is not among the known ones, with the closest of them."""
    known = list(known)
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(got).lower(), lower, n=1)
    hint = f"; did you mean {lower[close[0]]!r}?" if close else "."
    return f"unknown {what} {got!r}{hint} Known: {', '.join(known)}."


# --- checking and filling in ---------------------------------------------------------------------


def validate(config: RunConfig) -> None:
    """Raise ``ValueError`` with what was received and what is allowed, for the first bad value."""
    for name, hint in typing.get_type_hints(RunConfig).items():
        _check_type(name, getattr(config, name), hint)
    choices = {
        "profile": ["auto", *PROFILES],
        "augmix_ops": ["tpt", "torchvision"],
        "optimizer": ["adamw", "sgd"],
        "exact": ["fast", "paper", "tangent"],
        "class_token_position": ["end", "middle", "front"],
        "templates": ["", "single", "seven", "eighty", "dataset"],
        "transport": ["entropic", "exact", "independent", "mean"],
        "captioner": ["auto", "clip", "vit-gpt2"],
    }
    for name, known in choices.items():
        _check_name(name, getattr(config, name), known)
    ranges = {
        "selection_p_all": (lambda x: 0 < x <= 1, "a fraction in (0, 1], as rho of TPT"),
        "selection_p_patch": (lambda x: 0 < x <= 1, "a fraction in (0, 1]"),
        "learning_rate": (lambda x: 0 < x < math.inf, "a positive number"),
        "overlap": (lambda x: 0 <= x <= 1, "from 0 (patches touch) to 1 (each grows by itself)"),
        "crop_side": (lambda x: 0 < x <= 1, "a fraction in (0, 1], or nothing for TPT's crops"),
        "alpha_exponential_weightening": (math.isfinite, "a finite number"),
        "severity": (lambda x: 1 <= x <= 10, "a whole number from 1 to 10"),
        "n_aug": (lambda x: x >= 0, "0 or more"),
        "n_patches": (lambda x: x >= 0, "0 or more"),
        "n_ctx": (lambda x: x >= 1, "1 or more"),
        "n_generated": (lambda x: x >= 1, "1 or more"),
        "tta_steps": (lambda x: x >= 1, "1 or more"),
        "reduced_size": (lambda x: x >= 0, "a number of images, 0 or nothing for all"),
        "workers": (lambda x: x >= 0, "0 or more"),
    }
    for name, (holds, allowed) in ranges.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} is {value}; it must be {allowed}.")
    for name, methods in OF_METHOD.items():
        value, methods = getattr(config, name), (methods,) if isinstance(methods, str) else methods
        if config.method not in methods and value != getattr(RunConfig, name):
            known = " or ".join(map(repr, methods))
            raise ValueError(f"{name}={value!r} is for method {known}, not {config.method!r}.")
    if config.templates and config.coop:
        raise ValueError("templates and coop are both given; choose one of the two prompts.")
    if not (config.ctx_init or config.n_ctx or config.coop):
        raise ValueError("ctx_init is empty: say how many context tokens to draw with n_ctx.")
    from tpt_nb import adapt, captions, losses, views  # behind the checks that need no torch

    _check_name("method", config.method, adapt.METHODS)
    if config.templates and "lr" in inspect.signature(adapt.METHODS[config.method]).parameters:
        raise ValueError(
            f"templates={config.templates!r} is an ensemble of sentences, which has no context for "
            f"method {config.method!r} to tune; use zero_shot or confident_view, or no templates."
        )
    more_params(config)
    captions.parse_repairs(config.repairs)
    _check_name("loss", config.loss, losses.LOSSES)
    _check_name("augmenter", config.augmenter, views.AUGMENTERS)
    takes = views.AUGMENTERS[config.augmenter].__dataclass_fields__
    for name in ("n_patches", "overlap", "crop_side", "autoaugment"):
        value = getattr(config, name)
        if name not in takes and value != getattr(RunConfig, name):
            raise ValueError(
                f"{name}={value!r} means nothing to augmenter {config.augmenter!r}; it is for "
                f"{', '.join(n for n, a in views.AUGMENTERS.items() if hasattr(a, name))}."
            )
    if "loss" in inspect.signature(adapt.METHODS[config.method]).parameters:
        _check_loss(config, "n_patches" in takes)


def _check_loss(config: RunConfig, patches: bool) -> None:
    """Raise ``ValueError`` if the loss cannot work on the views that the augmenter will make."""
    import torch

    groups = ((math.isqrt(config.n_patches) ** 2 if patches else 0) + 1, config.n_aug + 1)
    loss = make_loss(config, groups)
    if hasattr(loss, "select"):
        loss.select(torch.zeros(math.prod(groups), 1), config.selection_p_all or 0.1)


def _check_name(name: str, value: str, known: typing.Iterable[str]) -> None:
    if value not in known:
        raise ValueError(unknown(name, value, [k or "''" for k in known]))


def _check_type(name: str, value: object, hint: object) -> None:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds:
        kinds = (*kinds, int)
    # bool is an int in Python, but n_aug=True is a mistake
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__.replace("NoneType", "None") for k in kinds)
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}); it must be {wanted}.")


def resolve(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with every default filled in, and why this profile.

    Checks it first (:func:`validate`). The profile only chooses a data set and a model where the
    configuration says "auto"; on its own it changes nothing.
    """
    validate(config)
    import torch

    from tpt_nb import datasets

    profile, why = choose_profile(config)
    changed = {
        name: names.get(getattr(config, name), getattr(config, name))
        for name, names in ALIASES.items()
    }
    dataset, model = PROFILES[profile]
    changed["profile"] = profile
    changed["dataset"] = dataset if config.dataset == "auto" else config.dataset
    changed["model"] = model = model if config.model == "auto" else config.model
    if changed["dataset"] not in datasets.known():
        raise ValueError(unknown("data set", changed["dataset"], datasets.known()))
    if config.profile == "full":
        bring(changed["dataset"], model, config.root)
    if config.device == "auto":
        changed["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        try:
            kind = torch.device(config.device).type
        except RuntimeError:
            raise ValueError(
                unknown("device", config.device, ["auto", "cpu", "cuda", "cuda:1"])
            ) from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {config.device!r}: there is no CUDA GPU here; use cpu.")
    if config.learning_rate is None:
        changed["learning_rate"] = default_learning_rate(model)
    if config.selection_p_all is None:
        changed["selection_p_all"] = default_rho(config.method)
    if config.tta_steps is None:
        changed["tta_steps"] = default_steps(config.method)
    if config.method in DIFFUSION and config.n_generated is None:
        from tpt_nb.diffusion import usual_number

        changed["n_generated"] = usual_number(config.generator)
    changed["params"] = ",".join(f"{k}={v}" for k, v in sorted(more_params(config).items()))
    if config.method in ONE_VIEW:  # the other views are not looked at
        usual = RunConfig()
        names = ("augmenter", "n_patches", "overlap", "crop_side", "augmix", "autoaugment")
        changed |= {name: getattr(usual, name) for name in names} | {"n_aug": 0}
    for name, hint in typing.get_type_hints(RunConfig).items():
        value = changed.get(name, getattr(config, name))
        if hint in (float, float | None) and value is not None:
            changed[name] = float(value)  # 1 and 1.0 are the same run
    if config.captioner == "auto" and config.method == "caption_prompts":
        changed["captioner"] = "clip" if model == "mini" else "vit-gpt2"
    if config.method == "caption_prompts":
        from tpt_nb.captions import parse_repairs

        changed["repairs"] = "+".join(parse_repairs(config.repairs)) or "none"
    changed["reduced_size"] = config.reduced_size or None
    changed["cache"] = config.cache or str(cache_dir())
    embedded = str(DATA / "miniclip" / "coop.pth.tar")
    changed["coop"] = coop = embedded if config.coop == "mini" else config.coop
    if coop and not Path(coop).is_file():
        raise ValueError(f"coop: there is no file {coop}.")
    return dataclasses.replace(config, **changed), why


def choose_profile(config: RunConfig) -> tuple[str, str]:
    """ "full" or "mini", and the reason as a sentence.

    "auto" is full only where a CUDA GPU, the weights and the data are there already: nothing is
    downloaded on a guess, unless ``TPT_NB_DOWNLOAD=1`` says so (the notebooks' first cell sets it
    on Colab and Kaggle). The embedded data set and the embedded model always mean mini.
    """
    if config.profile != "auto":
        return config.profile, "asked for"
    if config.dataset.startswith("iconshift"):
        return "mini", f"{config.dataset} is embedded"
    if config.model == "mini":
        return "mini", "the model mini is embedded"
    if "auto" not in (config.dataset, config.model):
        return "full", "data set and model are named"
    import torch

    if not torch.cuda.is_available():
        return "mini", "no CUDA GPU here"
    dataset, model = PROFILES["full"]
    if os.environ.get("TPT_NB_DOWNLOAD") == "1":
        try:
            bring(
                dataset if config.dataset == "auto" else config.dataset,
                model if config.model == "auto" else config.model,
                config.root,
            )
        except ValueError as error:
            return "mini", " ".join(str(error).split())
    if config.model == "auto" and not weights_here(model):
        return "mini", f"the weights of {model} are not on this machine (model={model} gets them)"
    if config.dataset == "auto":
        from tpt_nb import datasets

        try:
            datasets.load(dataset, n=None, root=config.root or None)
        except (ValueError, OSError) as error:
            return "mini", f"{dataset} is not on this machine ({_first_line(error)})"
    return "full", "a CUDA GPU, the weights and the data are here"


def bring(dataset: str, model: str, root: str = "") -> None:
    """Have the data set and the weights here, downloading what is not and can be.

    With ``TPT_NB_DOWNLOAD=0`` nothing is downloaded. Raises ``ValueError`` with all that is missing
    and from where it comes.
    """
    from tpt_nb import clip, datasets, sources

    allowed, missing = os.environ.get("TPT_NB_DOWNLOAD") != "0", []
    if model in clip.OPENAI_MODELS and not weights_here(model):
        try:
            if not allowed:
                raise OSError("TPT_NB_DOWNLOAD=0 forbids to download them")
            clip.fetch_weights(model)
        except OSError as error:
            missing.append(f"the weights of CLIP {model}: {error}")
    try:
        try:
            datasets.load(dataset, root=root or None)
        except FileNotFoundError:
            if root or not allowed or dataset not in sources.SOURCES:
                raise
            sources.get(dataset)
            datasets.load(dataset)
    except (ValueError, OSError) as error:
        missing.append(f"the images of {dataset}: {error}")
    if missing:
        raise ValueError(
            "not everything for the full profile is here:\n- "
            + "\n- ".join(missing)
            + "\nWithout them use profile=mini."
        )


def weights_here(model: str) -> bool:
    """Are OpenAI's weights of this model where open_clip or the clip package put them?"""
    import open_clip
    from huggingface_hub.constants import HF_HUB_CACHE

    from tpt_nb.clip import weights_file

    if weights_file(model):
        return True
    hub = (open_clip.get_pretrained_cfg(model.replace("/", "-"), "openai") or {}).get("hf_hub", "")
    folder = Path(HF_HUB_CACHE) / f"models--{hub.strip('/').replace('/', '--')}" / "snapshots"
    return bool(hub) and any(folder.glob("*/*clip*"))


def default_learning_rate(model: str) -> float:
    """TPT's 5e-3; for the embedded model the value chosen on its development data."""
    if model != "mini":
        return 5e-3
    path = DATA / "miniclip" / "config.json"
    try:
        return float(json.loads(path.read_text())["tpt_lr"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no learning rate for the model mini: {path} should hold the key 'tpt_lr' "
            f"({type(error).__name__}); restore it with `git checkout`, or give learning_rate."
        ) from None


def default_rho(method: str) -> float:
    """The selection ratio that a method has by default; 0.1, as TPT, for those that have none."""
    from tpt_nb.adapt import METHODS

    rho = inspect.signature(METHODS[method]).parameters.get("rho")
    return 0.1 if rho is None else float(rho.default)


def default_steps(method: str) -> int:
    """The optimiser steps that a method takes by default; 1 for those that take none."""
    from tpt_nb.adapt import METHODS

    steps = inspect.signature(METHODS[method]).parameters.get("steps")
    return 1 if steps is None else int(steps.default)


def more_params(config: RunConfig) -> dict:
    """``params`` as a dict: parameters of the method that are no option of their own.

    Raises ``ValueError`` for what the method does not take and for values of another type than that
    of the default.
    """
    from tpt_nb.adapt import METHODS

    takes = inspect.signature(METHODS[config.method]).parameters.values()
    options = {field.name for field in dataclasses.fields(RunConfig)} | set(RENAMED)
    known = {
        p.name: p.default
        for p in takes
        if p.name not in options and isinstance(p.default, int | float | str)
    }
    out = {}
    for part in filter(None, config.params.replace(" ", "").split(",")):
        name, _, text = part.partition("=")
        if name not in known:
            raise ValueError(
                unknown(f"parameter of {config.method}", name, known)
                if known
                else f"params={config.params!r}: {config.method} takes no further parameters."
            )
        try:
            out[name] = type(known[name])(text)
        except ValueError:
            kind = type(known[name]).__name__
            raise ValueError(f"params: {name} is {text!r}; it must be {kind}.") from None
    return out


# --- names ---------------------------------------------------------------------------------------

SHORT = {  # as the study's run names have them
    "n_aug": "naug",
    "n_patches": "npatch",
    "learning_rate": "lr",
    "selection_p_all": "spall",
    "selection_p_patch": "sppat",
    "reduced_size": "size",
    "alpha_exponential_weightening": "alpha",
    "class_token_position": "position",
}


def identity(resolved: RunConfig) -> dict:
    """Everything in a filled-in configuration that the records depend on.

    Local weights count by their content: a model that was trained again makes another run.
    """
    values = dataclasses.asdict(resolved)
    for name in NOT_IDENTITY:
        del values[name]
    values["device"] = resolved.device.split(":")[0]
    if not values["params"]:  # an option that came later: runs without it keep their names
        del values["params"]
    if resolved.method not in DIFFUSION:
        for name in ("generator", "n_generated", "generator_seed"):
            del values[name]
    elif resolved.generator != "crops":
        from tpt_nb.diffusion import load_generator

        values["generator"] = load_generator(resolved.generator).spec()  # with its weights
    files = {"coop": resolved.coop, "model": resolved.model}
    if resolved.model == "mini":
        files["model"] = str(DATA / "miniclip" / "miniclip.safetensors")
    if resolved.method == "ra_tta":
        files["descriptions"] = resolved.descriptions or str(DATA / "descriptions/iconshift.json")
        about = Path(resolved.database) / "about.json"
        files["database"] = str(about) if about.is_file() else resolved.database
    for name, path in files.items():
        if path and Path(path).is_file():
            values[name] = [Path(path).name, hashlib.sha256(Path(path).read_bytes()).hexdigest()]
    return {"version": VERSION, "group": GROUP, **values}


def run_name(config: RunConfig) -> str:
    """Data set, model, method, then what differs from the defaults, then a short hash.

    For example ``iconshift-a_mini_tpt_naug=31_size=500_1a2b3c4d``.
    """
    return _name(resolve(config)[0])


def _name(resolved: RunConfig) -> str:
    usual = {field.name: field.default for field in dataclasses.fields(resolved)}
    usual["learning_rate"] = default_learning_rate(resolved.model)
    usual["device"] = "cpu"
    usual["selection_p_all"] = default_rho(resolved.method)
    usual["tta_steps"] = default_steps(resolved.method)
    if resolved.method in DIFFUSION:
        from tpt_nb.diffusion import usual_number

        usual["n_generated"] = usual_number(resolved.generator)
    if resolved.method in ONE_VIEW:
        usual["n_aug"] = 0
    model = resolved.model
    parts = [resolved.run_name] if resolved.run_name else []
    parts += [resolved.dataset, Path(model).stem if Path(model).is_file() else model]
    parts.append(resolved.method)
    for name, default in usual.items():
        value = getattr(resolved, name)
        if name in (*NOT_IDENTITY, "dataset", "model", "method") or value == default:
            continue
        if name in ("coop", "root", "descriptions", "database", "generator"):
            value = Path(value).name.split(".")[0]
        elif name == "device":
            value = value.split(":")[0]
        value = f"{value:g}" if isinstance(value, float) else value
        parts.append(f"{SHORT.get(name, name)}={value}")
    text = re.sub(r"[^\w.=+-]+", "-", "_".join(parts))[:150]
    return f"{text}_{_hash(identity(resolved))}"


def _hash(values: Mapping) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


# --- running -------------------------------------------------------------------------------------


def run(config: RunConfig | Mapping, progress: bool = True) -> Run:
    """Do one run, go on with a killed one, or load a finished one.

    Images that cannot be decoded are left out, counted and named in the summary and at the end.
    Raises ``ValueError`` for a bad configuration, a data set without images, and a folder that
    holds a run of something else.
    """
    started = time.perf_counter()
    config = config if isinstance(config, RunConfig) else RunConfig.from_dict(config)
    resolved, why = resolve(config)
    _say_once(f"profile {resolved.profile}: {why}")
    from tpt_nb import datasets, metrics

    folder = Path(resolved.out) / _name(resolved)
    dataset = datasets.load(
        resolved.dataset,
        n=resolved.reduced_size,
        seed=resolved.subset_seed,
        root=resolved.root or None,
    )
    if not len(dataset):
        raise ValueError(f"the data set {resolved.dataset} has no images: nothing to run over.")
    if getattr(dataset, "note", ""):
        _say_once(dataset.note)
    header = {
        "name": folder.name,
        "hash": _hash(identity(resolved)),
        "identity": identity(resolved),
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint, "n": len(dataset)},
        "config": dataclasses.asdict(resolved),
        "classnames": list(dataset.classnames),
    }
    _check(folder, header)
    finished = _finished(folder, resolved)
    if finished:
        print(f"{folder} is complete: {len(finished.records)} records loaded, nothing computed")
        _report_failed(finished.summary)
        _hint_at_chance(finished.summary, len(dataset.classnames))
        if resolved.tensorboard and not list(folder.glob("events.out.tfevents.*")):
            write_tensorboard(finished, dataset.classnames)
        return finished

    from tpt_nb import adapt
    from tpt_nb.encode import encode

    method = adapt.METHODS[resolved.method]
    if hasattr(method, "check"):  # what it needs, before hours of encoding
        method.check(resolved, dataset)
    clip, prompts = model_and_prompts(resolved, dataset.classnames)
    augmenter = augmenter_of(resolved, clip.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", header)
    loaded = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*images failed")  # reported at the end
        features = encode(
            dataset,
            clip,
            augmenter,
            seed=resolved.seed,
            cache=Path(resolved.cache),
            workers=resolved.workers,
            progress=progress,
        )
    encoded = time.perf_counter()
    path = folder / "records.jsonl"
    records = _resume(path, list(features.ids))
    if records:
        print(f"{folder.name}: resumed at {len(records)} of {len(features.ids)} images")
    if hasattr(method, "bind"):  # what it takes beside features and prompts: captions, a database
        method = method.bind(resolved, clip, dataset)
    done = len(records)
    params = method_params(resolved, method)
    if "loss" in params:
        params["loss"] = make_loss(resolved, augmenter.groups)
    if "n_images" in inspect.signature(method).parameters:
        params["n_images"] = len(features.ids)  # of the whole run, so that resuming changes no bit
    with _bar(len(features.ids), done, resolved.method, progress) as bar:
        for fresh in _adapt_rest(path, features, done, method, params, prompts, clip):
            records += fresh
            bar.update(len(fresh))
    ended = time.perf_counter()
    seconds = {
        "load": loaded - started,
        "encode": encoded - loaded,
        "adapt": ended - encoded,
        "total": ended - started,
    }
    n, n_new = len(records), len(records) - done
    more = getattr(method, "seconds", {})  # of views that the method brought itself
    seconds |= {f"{key} (its own views)": value for key, value in more.items()}
    summary = {
        "name": folder.name,
        "dataset": dataset.name,
        "model": resolved.model,
        "method": resolved.method,
        **metrics.summarize(records),
        "failed": {"count": len(features.failed), "images": list(features.failed)},
        "resumed": done,
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        # encoding counts whenever it was done, so that a full cache does not flatter a method
        "seconds_per_image": (features.seconds + more.get("encode", 0)) / n
        + seconds["adapt"] / max(1, n_new),
        **({"seconds_to_generate": more["generate"] / n} if "generate" in more else {}),
        "encoded": features.encoded,
        "device": device_name(resolved.device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    result = Run(folder, resolved, records, summary)
    if resolved.tensorboard:
        write_tensorboard(result, dataset.classnames)
    _write_json(folder / "summary.json", summary)
    _report_failed(summary)
    _hint_at_chance(summary, len(dataset.classnames))
    return result


def augmenter_of(resolved: RunConfig, size: int):
    """The augmenter of a (filled-in) configuration, with views of ``size`` pixels."""
    from tpt_nb.views import AUGMENTERS, make_augmenter

    known = AUGMENTERS[resolved.augmenter].__dataclass_fields__
    params = {name: getattr(resolved, name) for name in known if hasattr(resolved, name)}
    return make_augmenter(resolved.augmenter, size=size, **params)


def load_run(path: str | Path) -> Run:
    """Read a run folder as it is, finished or not (then the summary is of what is there).

    Raises ``ValueError`` if it is no run folder or has no records.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run: there is no {folder / 'config.json'}.")
    header = json.loads((folder / "config.json").read_text())
    config = RunConfig.from_dict(header["config"])
    run_ = _finished(folder, config)
    if run_ is None:
        from tpt_nb.metrics import summarize

        records, _ = _whole_lines(folder / "records.jsonl")
        if not records:
            raise ValueError(f"{folder} has no records yet: start the run again to go on with it.")
        run_ = Run(folder, config, records, summarize(records))
    return run_


_last: dict[str, tuple] = {}  # model and prompts of the last run


def model_and_prompts(config: RunConfig, classnames: list[str]):
    """The model and the prompts of a (filled-in) configuration.

    Those of the last run if it had the same: what depends on nothing else (the Jacobian of the text
    tower) is then made once for many runs. Local weights are the same if their content is.
    """
    from tpt_nb import clip as clips

    names = ["model", "device", "ctx_init", "n_ctx", "coop", "class_token_position", "csc"]
    names += ["templates", "seed", *(["dataset"] if config.templates == "dataset" else [])]
    values = identity(config) | {"device": config.device}
    key = json.dumps([[values[name] for name in names], list(classnames)])
    if key not in _last:
        _last.clear()  # first, so that there are never two models in memory
        try:
            clip = clips.load(config.model, device=config.device)
        except RuntimeError as error:  # weights that cannot be fetched
            raise ValueError(str(error)) from error
        _last[key] = clip, make_prompts(config, clip, classnames)
    return _last[key]


def make_prompts(config: RunConfig, clip, classnames: list[str]):
    """The prompts of a (filled-in) configuration: CoOp's, words, random vectors, or an ensemble."""
    from tpt_nb.prompts import Prompts, TemplatePrompts

    if config.templates == "dataset":  # the sentence that CoOp has for it
        from tpt_nb.datasets import template

        return TemplatePrompts(clip, classnames, [template(config.dataset)])
    if config.templates:
        return TemplatePrompts(clip, classnames, config.templates)
    return Prompts(
        clip,
        classnames,
        ctx_init=config.ctx_init or None,
        n_ctx=config.n_ctx,
        coop=config.coop or None,
        class_token_position=config.class_token_position,
        class_specific=config.csc,
        seed=config.seed,
    )


def make_loss(config: RunConfig, groups: tuple[int, int]):
    """The loss of a configuration for views that lie in these groups (``augmenter.groups``)."""
    from tpt_nb.losses import get_loss

    return get_loss(
        config.loss,
        groups=groups,
        rho_patch=config.selection_p_patch,
        alpha=config.alpha_exponential_weightening,
        overlap=config.overlap,
    )


def method_params(config: RunConfig, method) -> dict:
    """The values of a (filled-in) configuration that the method takes, under its own names."""
    values = dataclasses.asdict(config)
    values |= {name: values[option] for name, option in RENAMED.items()} | more_params(config)
    names = list(inspect.signature(method).parameters)[2:]  # after features and prompts
    bound = getattr(method, "keywords", {})  # of a functools.partial
    return {name: values[name] for name in names if name in values and name not in bound}


def _adapt_rest(path: Path, features, done: int, method, params: dict, prompts, clip):
    """Adapt to the images after the first ``done``; append and yield the records of each group."""
    start = 0
    takes_ids = "ids" in inspect.signature(method).parameters
    # what an online method learns from one image it keeps for the next: all of them in one call
    size = len(features) if getattr(method, "online", False) else GROUP
    with open(path, "ab") as file:
        for ids, views, targets in features.batches(size):
            skip = max(0, done - start)
            start += len(ids)
            if skip >= len(ids):
                continue
            # the whole group is adapted even where some of it is there: same operations, same bits
            params |= {"ids": ids} if takes_ids else {}
            adapted = method(views.to(clip.device), prompts, **params)
            fresh = to_records(ids, targets, adapted)[skip:]
            file.write(b"".join(_line(record) for record in fresh))
            file.flush()
            yield fresh


def to_records(ids: list[str], targets, adapted) -> list[dict]:
    """Records of a batch of adapted images, as they are written.

    Probabilities are computed in float64 from the logits; values are rounded to 6 decimals, the
    probability of the true class (whose logarithm is used) to 6 significant digits.
    """
    columns: dict[str, list] = {"id": list(ids), "target": [int(t) for t in targets]}
    target = targets.long().cpu()[:, None]
    for when, logits in (("before", adapted.logits_before), ("after", adapted.logits)):
        log_p = logits.detach().double().cpu().log_softmax(-1)
        p = log_p.exp()
        order = log_p.argsort(dim=-1, descending=True, stable=True)
        columns[f"pred_{when}"] = order[:, 0].tolist()
        columns[f"top5_{when}"] = (order[:, :5] == target).any(-1).tolist()
        columns[f"conf_{when}"] = _round(p.amax(-1))
        columns[f"entropy_{when}"] = _round(-(p * log_p.clamp_min(-1e30)).sum(-1))
        columns[f"prob_target_{when}"] = [
            float(f"{x:.6g}") for x in p.gather(1, target)[:, 0].tolist()
        ]
    loss = adapted.loss
    columns["loss"] = [None] * len(ids) if loss is None else _round(loss.detach().double().cpu())
    columns["selected"] = [row.nonzero()[:, 0].tolist() for row in adapted.selected.cpu()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _round(values) -> list[float | None]:
    # + 0.0 turns -0.0 into 0.0; JSON has no NaN
    return [round(x, 6) + 0.0 if math.isfinite(x) else None for x in values.tolist()]


def _line(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"


def _bar(n: int, done: int, text: str, progress: bool):
    from tqdm.auto import tqdm

    # in a notebook tqdm.auto gives a widget, and that one does not look at TQDM_DISABLE itself
    off = {} if progress and not os.environ.get("TQDM_DISABLE") else {"disable": True}
    return tqdm(total=n, initial=done, desc=text, unit="img", **off)


# --- the folder ----------------------------------------------------------------------------------


def _check(folder: Path, header: dict) -> None:
    """Raise ``ValueError`` if the folder holds something other than this run."""
    path = folder / "config.json"
    if not path.exists():
        if (folder / "records.jsonl").exists():
            raise ValueError(f"{folder} has records but no config.json; delete that folder.")
        return
    try:
        old = json.loads(path.read_text())
        theirs = {**old["identity"], **old["dataset"]}
    except (ValueError, KeyError):
        theirs = {}
    mine = {**header["identity"], **header["dataset"]}
    differ = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
    if differ:
        raise ValueError(
            f"{folder} holds a run of another configuration or of other data (differs in "
            f"{', '.join(differ)}); delete that folder, or give another out or run_name."
        )


def _finished(folder: Path, config: RunConfig) -> Run | None:
    """The run in the folder if it is complete."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text())
    records, whole = _whole_lines(folder / "records.jsonl")
    if len(records) != summary["n"] or not whole:
        return None
    return Run(folder, config, records, summary)


def _whole_lines(path: Path) -> tuple[list[dict], bool]:
    """The records up to the first line that is torn or damaged, and whether that is all."""
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            return records, False
        if not isinstance(record, dict):
            return records, False
        records.append(record)
    return records, not rest


def _resume(path: Path, ids: list[str]) -> list[dict]:
    """The records that are there, in the order of ``ids``; what comes after them is cut off.

    A kill can leave half a line at the end; an image that failed and is readable now moves the ones
    behind it.
    """
    records, whole = _whole_lines(path)
    good = 0
    while good < min(len(records), len(ids)) and records[good].get("id") == ids[good]:
        good += 1
    if good < len(records):
        print(f"{path}: {len(records) - good} records of other images are cut off")
    if good < len(records) or not whole:
        lines = path.read_bytes().split(b"\n")[:good]
        os.truncate(path, sum(len(line) + 1 for line in lines))
    return records[:good]


def _write_json(path: Path, value: Mapping) -> None:
    """Whole or not at all: to a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


# --- reporting -----------------------------------------------------------------------------------

_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        print(text)


def _report_failed(summary: Mapping) -> None:
    failed = summary["failed"]
    if not failed["count"]:
        return
    print(f"{failed['count']} of {failed['count'] + summary['n']} images could not be read:")
    for image in failed["images"][:5]:
        print(f"  {image.get('path') or image['id']}: {image['error']}")
    if failed["count"] > 5:
        print(f"  ... all of them are in {summary['name']}/summary.json")


def _hint_at_chance(summary: Mapping, classes: int) -> None:
    """A model that guesses is right once in C; one whose labels are mixed up looks the same."""
    n = summary["n"]
    if n < 200 or classes < 2:
        return
    from scipy.stats import binom

    hits = round(summary["accuracy_before"] * n)
    if binom.sf(hits - 1, n, 1 / classes) > 0.01:  # guessing gives as many often enough
        print(
            f"hint: zero-shot is right on {hits} of {n} images, as guessing among {classes} "
            "classes would be. Check the label map: does each class folder stand for the class "
            "name of its label, in this order? And are the model's weights trained ones?"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    from importlib import metadata

    from tpt_nb import __version__

    out = {"python": platform.python_version(), "tpt_nb": __version__}
    for name in ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scipy"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "none"
    return out


def device_name(device: str) -> str:
    """What the run was computed on, in words."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def write_tensorboard(run_: Run, classnames: list[str]) -> None:
    """TensorBoard events of a run, computed from its records, with the study's tags.

    "Base" is before, "TPT_coop" after adaptation, whatever the prompt and the method: these are the
    names in the study's event files, kept so that its dashboards fit. Its KL divergence from the
    one-hot target is the cross-entropy.
    """
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    from tpt_nb import metrics

    for old in run_.dir.glob("events.out.tfevents.*"):  # of a run that was killed
        old.unlink()
    table = run_.frame
    n = len(table)
    count = np.arange(1, n + 1)
    before, after = metrics.WHEN
    right = {when: metrics.correct(table, when).astype(int) for when in metrics.WHEN}
    ce = {w: -np.log(np.maximum(table[f"prob_target_{w}"], 1e-45)) for w in metrics.WHEN}
    curves = {
        "Loss/value": table["loss"],
        "confidence/Base": table["conf_before"],
        "confidence/TPT_coop": table["conf_after"],
        "confidence/difference(TPT-base)": table["conf_after"] - table["conf_before"],
        "crossEntropy/Base": ce[before],
        "crossEntropy/TPT_coop": ce[after],
        "crossEntropy/difference(base-TPT)": ce[before] - ce[after],
        "KL/Base_vs_True": ce[before],
        "KL/TPT_vs_True": ce[after],
        "KL/Base-TPT": ce[before] - ce[after],
        "Samples/TPTchange": right[after] - right[before],
        "Samples/TPTcumulative_changed": (right[after] - right[before]).cumsum(),
    }
    final = {"crossEntropy/Final_Base": ce[before].sum()}
    final["crossEntropy/Final_TPT_coop"] = ce[after].sum()
    for tag, end, hits in (
        ("AccuracyTOP1", "", right),
        ("AccuracyTOP5", "_Top5", {w: table[f"top5_{w}"].to_numpy(int) for w in metrics.WHEN}),
    ):
        base, tpt = (hits[when].cumsum() / count for when in metrics.WHEN)
        curves[f"{tag}/Base{end}"], curves[f"{tag}/TPT_coop{end}"] = base, tpt
        curves[f"{tag}/difference{end}(TPT-base)"] = tpt - base
        final[f"{tag}/Final_Base{end}"], final[f"{tag}/Final_TPT_coop{end}"] = base[-1], tpt[-1]
    classes = metrics.per_class(table, classnames)
    info = "Samples-PerClass-info"
    by_class = {
        f"{info}/Nsamples": classes["n"],
        f"{info}/NImproved": classes["improved"],
        f"{info}/NWorsened": classes["worsened"],
        f"{info}/ImprovedRatio": classes["improved"] / classes["n"],
        f"{info}/WorsenedRatio": classes["worsened"] / classes["n"],
        "Samples-PerClass/Changed": classes["improved"] - classes["worsened"],
    }
    changes = metrics.changes(table)
    for name in ("Improved", "Worsened"):
        final[f"Samples-Global/N{name}"] = changes[name.lower()]
        final[f"Samples-Global/{name}Ratio"] = changes[name.lower()] / n
    steps = {tag: enumerate(values) for tag, values in curves.items()}
    steps |= {tag: values.items() for tag, values in by_class.items()}
    steps |= {tag: [(0, value)] for tag, value in final.items()}
    with SummaryWriter(log_dir=str(run_.dir)) as writer:
        writer.add_text("Config", json.dumps(dataclasses.asdict(run_.config), indent=4))
        for tag, points in steps.items():
            for step, value in points:
                if value is not None and math.isfinite(value):
                    writer.add_scalar(tag, value, step)
        writer.add_text("statistics/perclass", classes.to_json(orient="records", indent=4))
        writer.add_text("statistics/global", json.dumps({**changes, "n_samples": n}, indent=4))
