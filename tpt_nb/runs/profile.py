"""Filling a configuration in: the profile, the device, the method's defaults."""

import dataclasses
import os
import typing
from pathlib import Path

import torch

from tpt_nb import datasets, methods, models
from tpt_nb.core.messages import first_line, unknown
from tpt_nb.core.paths import DATA, cache_dir
from tpt_nb.runs.config import VIEWS, RunConfig, check, options_of

PROFILES = {"full": ("imagenet-a", "RN50"), "mini": ("iconshift-a", "mini")}


def resolve(config: RunConfig) -> tuple[RunConfig, str]:
    """The configuration with every default filled in, and why this profile.

    The profile only chooses a data set and a model where the configuration says "auto"; on its own
    it changes nothing. Raises ``ValueError`` for the first value that is wrong.
    """
    check(config)
    options = options_of(config)
    profile, why = choose_profile(config)
    dataset, model = PROFILES[profile]
    changed: dict = {"profile": profile}
    changed["dataset"] = dataset if config.dataset == "auto" else config.dataset
    changed["model"] = model if config.model == "auto" else config.model
    datasets.get(changed["dataset"])  # raises if there is none of this name
    if config.profile == "full":
        bring(changed["dataset"], changed["model"], config.root)
    changed["device"] = _device(config.device)
    study = RunConfig.__dataclass_fields__["augmenter"].metadata["aliases"]
    changed["augmenter"] = study.get(config.augmenter, config.augmenter)
    method = methods.get(config.method)
    if method.views == "first":  # the other views are not looked at
        usual = RunConfig()
        changed |= {name: getattr(usual, name) for name in VIEWS} | {"n_aug": 0}
        changed |= {name: getattr(config, name) for name in ("augmix_ops", "severity")}
    for name, hint in typing.get_type_hints(RunConfig).items():
        value = changed.get(name, getattr(config, name))
        if hint in (float, float | None) and value is not None:
            changed[name] = float(value)  # 1 and 1.0 are the same run
    changed["reduced_size"] = config.reduced_size or None
    changed["cache"] = config.cache or str(cache_dir())
    embedded = str(DATA / "miniclip" / "coop.pth.tar")
    changed["coop"] = coop = embedded if config.coop == "mini" else config.coop
    if coop and not Path(coop).is_file():
        raise ValueError(f"coop: there is no file {coop}.")
    resolved = dataclasses.replace(config, **changed)
    if method.resolve:
        options = method.resolve(options, resolved)
    return dataclasses.replace(resolved, options=dataclasses.asdict(options)), why


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(unknown("device", name, ["auto", "cpu", "cuda", "cuda:1"])) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: there is no CUDA GPU here; use cpu.")
    return name


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
        try:
            datasets.load(dataset, n=None, root=config.root or None)
        except (ValueError, OSError) as error:
            return "mini", f"{dataset} is not on this machine ({first_line(error)})"
    return "full", "a CUDA GPU, the weights and the data are here"


def bring(dataset: str, model: str, root: str = "") -> None:
    """Have the data set and the weights here, downloading what is not and can be.

    With ``TPT_NB_DOWNLOAD=0`` nothing is downloaded. Raises ``ValueError`` with all that is missing
    and from where it comes.
    """
    allowed, missing = os.environ.get("TPT_NB_DOWNLOAD") != "0", []
    if model in models.OPENAI_MODELS and not weights_here(model):
        try:
            if not allowed:
                raise OSError("TPT_NB_DOWNLOAD=0 forbids to download them")
            models.fetch_weights(model)
        except OSError as error:
            missing.append(f"the weights of CLIP {model}: {error}")
    try:
        try:
            datasets.load(dataset, root=root or None)
        except FileNotFoundError:
            if root or not allowed or dataset not in datasets.SOURCES:
                raise
            datasets.download(dataset)
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

    if models.weights_file(model):
        return True
    hub = (open_clip.get_pretrained_cfg(model.replace("/", "-"), "openai") or {}).get("hf_hub", "")
    folder = Path(HF_HUB_CACHE) / f"models--{hub.strip('/').replace('/', '--')}" / "snapshots"
    return bool(hub) and any(folder.glob("*/*clip*"))
