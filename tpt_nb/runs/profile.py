"""Filling a configuration in: the profile, the device, the method's defaults."""

import dataclasses
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tpt_nb import datasets, features, methods, models
from tpt_nb.core import machine
from tpt_nb.core.messages import unknown
from tpt_nb.core.paths import DATA, cache_dir, datasets_dir
from tpt_nb.runs.config import VIEWS, RunConfig, check, options_of

PROFILES = {"full": ("imagenet-a", "RN50"), "mini": ("iconshift-a", "mini")}
CONTEXTS = ("coop-weights", "coop-rn50")  # downloads that may hold the CoOp context of a model
Need = str | Callable[[], object]  # a data set by name, or what brings something else


def resolve(
    config: RunConfig, needs: Sequence[Need] = (), lacking: str = ""
) -> tuple[RunConfig, str]:
    """The configuration with every default filled in, and why this profile.

    The profile only chooses a data set and a model where the configuration says "auto"; on its own
    it changes nothing. What else a profile needs: see :func:`bring`. Raises ``ValueError`` for the
    first value that is wrong.
    """
    check(config)
    options = options_of(config)
    profile, why = choose_profile(config, needs, lacking)
    dataset, model = PROFILES[profile]
    changed: dict = {"profile": profile}
    changed["dataset"] = dataset if config.dataset == "auto" else config.dataset
    changed["model"] = model if config.model == "auto" else config.model
    datasets.get(changed["dataset"])  # raises if there is none of this name
    if config.profile == "full":
        more = _needs(config, needs)
        bring(changed["dataset"], changed["model"], config.root, more, lacking)
    changed["device"] = _device(config.device)
    for f in dataclasses.fields(RunConfig):  # older spellings of values
        if f.metadata.get("aliases"):
            value = getattr(config, f.name)
            changed[f.name] = f.metadata["aliases"].get(value, value)
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
    if config.embeddings:
        of = (changed["model"], config.seed, datasets.file_name(changed["dataset"]))
        changed["embeddings"] = str(features.find_given(config.embeddings, *of))
    changed["cache"] = config.cache or str(cache_dir())
    coop = "mini" if config.coop == "mini" else changed["model"]
    named = config.coop not in ("mini", "auto")
    changed["coop"] = coop = config.coop if named else coop_context(coop)
    if coop and not Path(coop).is_file():
        raise ValueError(f"coop: there is no file {coop}.")
    resolved = dataclasses.replace(config, **changed)
    if method.resolve:
        options = method.resolve(options, resolved)
    return dataclasses.replace(resolved, options=dataclasses.asdict(options)), why


def data_of(config: RunConfig) -> tuple[datasets.Dataset, features.Features | None]:
    """The images of a (filled-in) configuration, with the class names that it asks for.

    Where the configuration names embeddings of others: their ids and labels, and the features.
    """
    name, words = config.dataset, config.classnames
    if not config.embeddings:
        root = config.root or None
        data = datasets.load(name, config.reduced_size, config.subset_seed, root)
        return (datasets.reworded(data, words) if words else data), None
    try:
        names = datasets.load(name, 1, root=config.root or None).classnames
    except FileNotFoundError:  # the pictures need not be here
        names = datasets.known_classnames(name, words)
    place, n = Path(config.embeddings), config.reduced_size
    found, data = features.read_given(place, name, names, n, config.subset_seed)
    return (datasets.reworded(data, words) if words else data), found


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if machine.has_gpu() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(unknown("device", name, ["auto", "cpu", "cuda", "cuda:1"])) from None
    if kind == "cuda" and (problem := machine.gpu_problem()):
        raise ValueError(f"device {name!r}: {problem}; use cpu.")
    return name


def choose_profile(
    config: RunConfig, needs: Sequence[Need] = (), lacking: str = ""
) -> tuple[str, str]:
    """ "full" or "mini", and the reason as a sentence.

    "auto" is full only where a CUDA GPU, the weights, the data and what else is needed are there
    already: nothing is downloaded on a guess, unless ``TPT_NB_DOWNLOAD=1`` says so (the notebooks'
    first cell sets it on Colab and Kaggle). The embedded data set and the embedded model always
    mean mini. ``TPT_NB_PRETEND_GPU=1`` counts as a GPU, for this choice alone: the rehearsal of the
    full profile runs on the CPU. ``needs`` and ``lacking``: see :func:`bring`.
    """
    if config.profile != "auto":
        return config.profile, "asked for"
    if config.dataset.startswith("iconshift"):
        return "mini", f"{config.dataset} is embedded"
    if config.model == "mini":
        return "mini", "the model mini is embedded"
    if "auto" not in (config.dataset, config.model):
        return "full", "data set and model are named"
    if (problem := machine.gpu_problem()) and os.environ.get("TPT_NB_PRETEND_GPU") != "1":
        return "mini", problem
    if lacking:
        return "mini", f"for full this notebook needs {lacking}"
    dataset, model = PROFILES["full"]
    dataset = dataset if config.dataset == "auto" else config.dataset
    model = model if config.model == "auto" else config.model
    allowed = os.environ.get("TPT_NB_DOWNLOAD") == "1"
    if missing := _missing(dataset, model, config.root, _needs(config, needs), allowed):
        return "mini", " ".join("; ".join(missing).split())
    gpu = "no GPU but TPT_NB_PRETEND_GPU" if problem else "a CUDA GPU"
    return "full", f"{gpu}, the weights and the data are here"


def _needs(config: RunConfig, needs: Sequence[Need]) -> list[Need]:
    """What a notebook says that it needs, and the context where the configuration has one."""
    return [*needs, *(["coop"] if config.coop == "auto" else [])]


def bring(
    dataset: str, model: str, root: str = "", needs: Sequence[Need] = (), lacking: str = ""
) -> None:
    """Have the data set, the weights and what else is needed here; download what is not and can be.

    With ``TPT_NB_DOWNLOAD=0`` nothing is downloaded.

    Args:
        needs: "coop" for the CoOp context of the model, names of other data sets, or functions that
            bring something; they raise ``ValueError``, ``OSError`` or ``RuntimeError``.
        lacking: in words, what only the reader can give. If it is not empty nothing is downloaded.
    Raises:
        ValueError: all that is missing, and from where it comes.
    """
    allowed = os.environ.get("TPT_NB_DOWNLOAD") != "0"
    missing = [lacking] if lacking else _missing(dataset, model, root, needs, allowed)
    if missing:
        raise ValueError(
            "not everything for the full profile is here:\n- "
            + "\n- ".join(missing)
            + "\nWithout them use profile=mini."
        )


def _missing(
    dataset: str, model: str, root: str, needs: Sequence[Need], allowed: bool
) -> list[str]:
    """What cannot be brought, and why; downloads where that is allowed."""
    steps: dict[str, Callable[[], object]] = {}  # what is small comes first
    for number, need in enumerate(needs):
        if callable(need):
            steps[f"also needed ({number + 1})"] = need
        elif need == "coop":
            steps["the CoOp context"] = lambda: coop_context(model, allowed)
        elif need != dataset:
            steps[f"the images of {need}"] = lambda need=need: _bring_images(need, "", allowed)
    steps[f"the weights of CLIP {model}"] = lambda: _bring_weights(model, allowed)
    steps[f"the images of {dataset}"] = lambda: _bring_images(dataset, root, allowed)
    missing = []
    for what, step in steps.items():
        try:
            step()
        except (ValueError, OSError, RuntimeError) as error:
            missing.append(f"{what}: {error}")
    return missing


def _bring_weights(model: str, allowed: bool) -> None:
    if model not in models.OPENAI_MODELS or weights_here(model):
        return
    if not allowed:
        raise OSError(f"{_forbidden()} (model={model} gets them)")
    models.fetch_weights(model)


def _bring_images(name: str, root: str, allowed: bool) -> None:
    try:
        datasets.load(name, root=root or None)
    except FileNotFoundError:
        if root or not allowed or name not in datasets.SOURCES:
            raise
        datasets.download(name)
        datasets.load(name)


def _forbidden() -> str:
    """Why nothing is downloaded."""
    if os.environ.get("TPT_NB_DOWNLOAD") == "0":
        return "TPT_NB_DOWNLOAD=0 forbids to download them"
    return "they are not on this machine"


def coop_context(model: str, allowed: bool | None = None) -> str:
    """The file with the CoOp context of a model: the embedded one, or that of CoOp's authors.

    "" for a model that they published none for. Theirs, 16 shots on ImageNet and M = 4, is
    downloaded unless ``TPT_NB_DOWNLOAD=0`` forbids it (one zip file for four models on Google
    Drive; for RN50 else the file of 75 MB that the study of patches and losses kept). Zhou et al.,
    "Learning to Prompt for Vision-Language Models", 2022. Raises ``OSError`` if it cannot be had.
    """
    if model == "mini":
        return str(DATA / "miniclip" / "coop.pth.tar")
    if model not in models.BACKBONES:
        return ""
    allowed = os.environ.get("TPT_NB_DOWNLOAD") != "0" if allowed is None else allowed
    places = CONTEXTS if model == "RN50" else CONTEXTS[:1]
    problems = []
    for download in (False, True) if allowed else (False,):
        for name in places:
            try:
                folder = datasets.download(name) if download else datasets_dir() / name
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            if found := models.find_coop(folder, model):
                return str(found)
            problems += [f"{folder} holds no context for {model} with M=4"] if download else []
    problems = problems or [f"{datasets_dir() / CONTEXTS[0]} does not hold it; {_forbidden()}"]
    raise OSError(
        "\n".join(problems)
        + "\nWithout it, coop='' starts from the words of ctx_init; the row is then not CoOp's."
    )


def start_name(config: RunConfig) -> str:
    """How a table calls the prompt that a (filled-in) run starts from: by what was run."""
    if config.templates:
        return f"{config.templates} templates"
    if config.coop:
        return "CoOp prompt"
    return f'prompt "{config.ctx_init}"' if config.ctx_init else "random prompt"


def weights_here(model: str) -> bool:
    """Are OpenAI's weights of this model where open_clip or the clip package put them?"""
    import open_clip
    from huggingface_hub.constants import HF_HUB_CACHE

    if models.weights_file(model):
        return True
    hub = (open_clip.get_pretrained_cfg(model.replace("/", "-"), "openai") or {}).get("hf_hub", "")
    folder = Path(HF_HUB_CACHE) / f"models--{hub.strip('/').replace('/', '--')}" / "snapshots"
    return bool(hub) and any(folder.glob("*/*clip*"))
