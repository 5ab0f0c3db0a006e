"""Load a CLIP by name, through open_clip.

:func:`load` knows the embedded ``mini``, the OpenAI models, every other open_clip model
(``model@tag``) and local checkpoint files. All of them become a :class:`Clip`: a frozen model of
open_clip with its tokenizer, its image statistics and a fingerprint of its weights. CLIP itself is
Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.

``mini`` needs nothing but torch and open_clip's tokenizer: open_clip as a whole, which takes
seconds to import, is imported by whoever asks for another model.
"""

import json
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tpt_nb.core.files import write_whole
from tpt_nb.core.messages import first_line
from tpt_nb.core.paths import DATA
from tpt_nb.models.clip import EOT, OPENAI_MODELS, SOT, Clip, wrap
from tpt_nb.models.mini import MiniClip

MINI_CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {"layers": (1, 1, 2, 1), "width": 24, "head_width": 64, "image_size": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 3},
    "quick_gelu": True,
}
MINI_PATH = DATA / "miniclip" / "miniclip.safetensors"
# where OpenAI's package and open_clip look too; "~" stays where there is no home folder
ARCHIVES_DIR = Path(os.path.expanduser("~/.cache/clip"))


def build_mini(seed: int = 0, config: dict | None = None) -> nn.Module:
    """An untrained MiniCLIP: open_clip's class from a config, weights drawn from ``seed``.

    The global random state is left as it was.
    """
    import open_clip

    config = MINI_CONFIG if config is None else config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
    model.mini_config = config
    return model


def save_mini(model: nn.Module, token_ids: list[int] | Tensor, path: str | Path) -> None:
    """Write a MiniCLIP as safetensors: float16, and only the embedding rows of ``token_ids``.

    Statistics of batch norm and the logit scale stay float32 (they are tiny, and variances can
    leave the range of float16). Start and end of text are always among the rows.
    """
    from safetensors.torch import save

    ids = torch.as_tensor(sorted({int(i) for i in token_ids} | {SOT, EOT}), dtype=torch.int32)
    tensors = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu()
        if key == "token_embedding.weight":
            key, value = "token_rows", value[ids.long()]
        keep = not value.is_floating_point() or "running_" in key or key == "logit_scale"
        stored = value if keep else value.half()
        if value.is_floating_point() and not stored.isfinite().all():
            raise ValueError(f"{key} has values that float16 cannot hold; is the training healthy?")
        tensors[key] = stored.contiguous()
    config = getattr(model, "mini_config", MINI_CONFIG)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save({**tensors, "token_ids": ids}, metadata={"config": json.dumps(config)}))


def load_mini(path: str | Path = MINI_PATH, device: str | torch.device | None = None) -> Clip:
    """MiniCLIP from its safetensors file; embedding rows that training never saw are zero.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged; the message says how to
            rebuild it.
    """
    from safetensors import safe_open

    path = Path(path)
    rebuild = "restore it with `git checkout`, or rebuild it: data/miniclip/train.py, then text.py"
    if not path.is_file():
        raise FileNotFoundError(f"the weights of MiniCLIP are not at {path}; {rebuild}.")
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        ids, rows = tensors.pop("token_ids").long(), tensors.pop("token_rows")
        # what is drawn here is replaced; without draws, on "meta", torch would import its compiler
        with torch.random.fork_rng(devices=[]):
            model = MiniClip(**config)
        table = torch.zeros(model.vocab_size, rows.shape[1])
        table[ids] = rows.float()
        state = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        model.load_state_dict({**state, "token_embedding.weight": table}, assign=True)
        _refuse_not_finite({**state, "token_rows": rows})
    except Exception as error:  # damaged bytes raise whatever they spell
        why = first_line(error) or type(error).__name__
        raise ValueError(f"{path} is no readable MiniCLIP file ({why}); {rebuild}.") from error
    model.mini_config = config
    return wrap(model, "mini", device=device, seen_tokens=ids)


def load(name: str = "mini", device: str | torch.device | None = None) -> Clip:
    """A frozen CLIP by name.

    Args:
        name: ``mini``; an OpenAI model (``RN50`` ... ``ViT-L/14``); ``model@tag`` or
            ``model@file`` for any open_clip architecture (``ViT-B-32@laion2b_s34b_b79k``); or a
            path to a checkpoint of the OpenAI family: TorchScript archive, state dict (``.pt``) or
            safetensors. A state dict does not say which activation it was trained with: a bare
            path means QuickGELU, as OpenAI's; ``model@file`` takes the activation of that
            architecture.
        device: default: cuda if there is one, else cpu.

    SigLIP (``ViT-B-16-SigLIP@webli``; Zhai et al., "Sigmoid Loss for Language Image Pre-Training",
    2023) scores each pair of picture and sentence on its own, ``sigmoid(scale * cosine + bias)``:
    classes do not compete, and its scores of all classes may be small at once. What methods here
    need, an entropy and a vote, is taken from the softmax over the classes of ``scale * cosine``,
    as others do who adapt it at test time. The bias drops out of a softmax, and the first class
    stays the first: zero-shot predictions and votes are those of the sigmoid scores. An entropy
    then says how far the best class is ahead of the others, not how well it fits; confidences and
    ECE are those of this softmax, for which the model was not trained. The bias is
    ``clip.logit_bias``. Its text tower is not causal, so contexts are tuned by plain autograd
    through all tokens, which is slower than with CLIP's. Views are made as for CLIP (it was trained
    on pictures squashed to a square, not cropped).

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name == "mini":
        return load_mini(device=device)
    import open_clip

    openai = {known: _hyphened(known) for known in OPENAI_MODELS}
    if name in openai or name in openai.values():
        return _load_openai(name, openai.get(name, name), device)
    if Path(name).is_file():
        return _load_file(Path(name), device)
    architecture, _, tag = name.partition("@")
    if tag and architecture in open_clip.list_models():
        return _load_open_clip(name, architecture, tag, device)
    raise ValueError(
        f"unknown model {name!r}. Known: mini, {', '.join(OPENAI_MODELS)}, "
        "'model@tag' with a pair of open_clip.list_pretrained(), or the path of a checkpoint file"
        + (f" (there is no file {name})." if Path(name).suffix else ".")
    )


def _load_openai(name: str, architecture: str, device) -> Clip:
    """OpenAI's weights: the archive if it is here, else through open_clip, else the archive."""
    here = weights_file(architecture)
    if here:
        return _load_file(here, device, name)
    try:
        return _load_open_clip(name, architecture, "openai", device)
    except RuntimeError:
        if os.environ.get("TPT_NB_DOWNLOAD") == "0":
            raise
    try:
        return _load_file(_fetch_archive(architecture), device, name)
    except OSError as error:
        raise RuntimeError(f"{error}\nWithout a network use 'mini'.") from error


def weights_file(model: str) -> Path | None:
    """OpenAI's archive of this model, if it is where the clip package and open_clip put it."""
    path = ARCHIVES_DIR / archive_source(model)[0]
    return path if path.is_file() else None


def fetch_weights(model: str) -> Path | None:
    """Have OpenAI's weights on this machine; the archive, or None if open_clip's cache has them.

    Raises ``OSError`` if neither OpenAI's server nor the hub of open_clip gives them.
    """
    import open_clip

    try:
        return weights_file(model) or _fetch_archive(model)
    except OSError as error:
        try:
            config = open_clip.get_pretrained_cfg(_hyphened(model), "openai")
            open_clip.download_pretrained(config)
        except Exception as second:
            raise OSError(f"{error}\nThe hub: {first_line(second) or repr(second)}") from second
        return None


def _fetch_archive(model: str) -> Path:
    from tpt_nb.core.download import Source, fetch

    name, url, sha256 = archive_source(model)
    return fetch(Source(name, (url,), sha256=sha256), ARCHIVES_DIR)


def archive_source(model: str) -> tuple[str, str, str]:
    """File name, address and checksum (which is part of the address) of OpenAI's archive."""
    import open_clip

    url = open_clip.get_pretrained_cfg(_hyphened(model), "openai")["url"]
    return url.rsplit("/")[-1], url, url.split("/")[-2]


def _hyphened(model: str) -> str:
    return model.replace("/", "-").replace("@336px", "-336")


def _load_open_clip(name: str, architecture: str, tag: str, device) -> Clip:
    """Through open_clip, with the activation that the pretrained tag was trained with."""
    import open_clip

    known = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in known and not Path(tag).is_file():
        raise ValueError(
            f"{architecture} has no weights {tag!r}; known tags: {', '.join(known) or 'none'}."
        )
    config = open_clip.get_pretrained_cfg(architecture, tag) or {}
    quick, statistics = bool(config.get("quick_gelu")), _statistics(architecture, tag, known)
    try:
        model = open_clip.create_model(
            architecture, pretrained=tag, force_quick_gelu=quick, **statistics
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"could not load the weights of {name!r}: {error}. They are downloaded once; "
            "without a network use 'mini', or pass the path of a checkpoint that you have."
        ) from error
    return wrap(model, name, device=device, tokenizer=tokenizer)


def _statistics(architecture: str, tag: str, known: Sequence[str]) -> dict[str, tuple]:
    """For a file, which has none of its own: those of the images of all published weights.

    SigLIP's are not CLIP's. Nothing where the weights differ in them, or there are none.
    """
    import open_clip

    if tag in known:
        return {}
    configs = [open_clip.get_pretrained_cfg(architecture, other) for other in known]
    found = {(tuple(c.get("mean") or ()), tuple(c.get("std") or ())) for c in configs}
    if len(found) != 1 or not all(*found):
        return {}
    ((mean, std),) = found
    return {"image_mean": mean, "image_std": std}


def _load_file(path: Path, device, name: str = "") -> Clip:
    """A local checkpoint of the OpenAI family, or a MiniCLIP file."""
    from open_clip.model import build_model_from_openai_state_dict

    try:
        state = _read_state(path)
        _refuse_not_finite(state)
    except Exception as error:  # damaged bytes raise whatever they spell
        why = first_line(error) or type(error).__name__
        raise ValueError(f"{path} is no readable checkpoint ({why}).") from error
    if "token_rows" in state:
        return load_mini(path, device)
    for key in ("input_resolution", "context_length", "vocab_size"):
        state.pop(key, None)
    try:
        model = build_model_from_openai_state_dict(dict(state), cast_dtype=None).float()
        model.load_state_dict(state)  # again: the builder rounds float32 weights to float16
    except Exception as error:  # the builder computes sizes from whatever shapes it finds
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{path} is not a checkpoint of the OpenAI family ({why}); "
            f"for another architecture name it, as in 'ViT-B-32@{path}'."
        ) from error
    return wrap(model, name or path.name, device=device)


def _read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, a TorchScript archive or a file of ``torch.save``."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    if _is_torchscript(path):
        with warnings.catch_warnings():  # torch advises torch.export, but OpenAI's files are these
            warnings.simplefilter("ignore", DeprecationWarning)
            state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}


def _refuse_not_finite(state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{key} has values that are not finite")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("constants.pkl") for entry in archive.namelist())
