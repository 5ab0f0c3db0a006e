"""Load a CLIP by name through open_clip; encode views and sentences to unit-norm features.

``load`` knows the embedded ``mini``, the OpenAI models, every other open_clip model
(``model@tag``) and local checkpoint files. All of them become a :class:`Clip`: a frozen open_clip
model with its tokenizer, its image statistics and a fingerprint of its weights. CLIP itself is
Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
"""

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import build_model_from_openai_state_dict
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from tpt_nb.paths import DATA

MINI_CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {"layers": (1, 1, 2, 1), "width": 24, "head_width": 64, "image_size": 64},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 192,
        "heads": 3,
        "layers": 3,
    },
    "quick_gelu": True,
}
MINI_PATH = DATA / "miniclip" / "miniclip.safetensors"
OPENAI_MODELS = (
    "RN50",
    "RN101",
    "RN50x4",
    "RN50x16",
    "RN50x64",
    "ViT-B/32",
    "ViT-B/16",
    "ViT-L/14",
    "ViT-L/14@336px",
)
SOT, EOT = 49406, 49407
ARCHIVES_DIR = Path.home() / ".cache" / "clip"  # where OpenAI's package and open_clip look too


@dataclass
class Clip:
    """A frozen CLIP with everything needed to feed it.

    ``model`` is an open_clip model in eval mode without gradients, ``tokenizer`` maps a list of
    sentences to token ids ``[N,77]`` (long), ``mean`` and ``std`` are per-channel statistics of
    images in [0,1]. ``fingerprint`` is a hash of the weights, ``image_fingerprint`` of those of the
    image tower (part of the key of the feature cache: another text tower, the same features).
    ``max_views`` is set when a pass ran out of memory: no later one is larger.
    """

    name: str
    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    fingerprint: str
    image_fingerprint: str = ""
    max_views: int | None = None

    @property
    def embed_dim(self) -> int:
        """Width D of the joint space."""
        tower = text_tower(self.model)
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            return projection.out_features
        return projection.shape[1] if projection is not None else self.ctx_dim

    @property
    def ctx_dim(self) -> int:
        """Width d of the text transformer, hence of context vectors."""
        return text_tower(self.model).token_embedding.weight.shape[1]

    @property
    def logit_scale(self) -> Tensor:
        """``exp(logit_scale)``, a float32 scalar on the device (about 100 in trained models)."""
        return self.model.logit_scale.detach().float().exp().squeeze()

    @torch.no_grad()
    def encode_views(self, views: Tensor, batch: int = 256, checked: bool = True) -> Tensor:
        """Features of views that already have the model's image size.

        Args:
            views: ``[V,3,H,W]``, uint8 in 0..255 or float in [0,1]; normalised here.
            batch: views per pass of the image encoder, at most; on a GPU fewer where memory is
                short, and half as many after a pass that ran out of it.
            checked: on a GPU, wait for each pass to see whether it overflowed in half precision,
                and compute it again if so; False: whoever asked looks for numbers not finite.
        Returns:
            ``[V,D]`` float32, unit norm, on the model's device.
        Raises:
            ValueError: wrong shape, size or range.
            RuntimeError: not even one view fits into memory.
        """
        self._check_views(views)
        features, done = [], 0
        step = min(batch, self.max_views or batch, self._room())
        while done < len(views):
            try:
                features.append(self._encode_pass(views[done : done + step], checked))
                done += step
                continue
            except torch.OutOfMemoryError as error:
                if step == 1:
                    raise RuntimeError(
                        f"the memory of {self.device} cannot hold one view of {self.image_size} px "
                        f"beside {self.name}; is another program using it?"
                    ) from error
            # behind the except clause, whose traceback would keep the tensors of the pass alive
            step = self.max_views = step // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if not features:
            return torch.empty(0, self.embed_dim, device=self.device)
        return torch.cat(features)

    def _encode_pass(self, views: Tensor, checked: bool = True) -> Tensor:
        """One pass of the image encoder: ``[V,3,S,S]`` -> ``[V,D]`` float32, unit norm."""
        dtype = next(self.model.parameters()).dtype
        mean = torch.tensor(self.mean, device=self.device, dtype=dtype).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=self.device, dtype=dtype).view(1, 3, 1, 1)
        x = views.to(self.device, non_blocking=True)
        x = x.to(dtype) / 255 if views.dtype == torch.uint8 else x.to(dtype)
        x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
        for amp in self._precisions():
            kind = self.device.type
            with torch.autocast(kind, amp or torch.bfloat16, enabled=amp is not None):
                features = self.model.encode_image(x).float()
            if amp != torch.float16 or not checked or features.isfinite().all():
                break
        return F.normalize(features, dim=-1)

    def _precisions(self) -> list[torch.dtype | None]:
        """What to compute in, in this order until all features are finite; None: as the weights.

        On a GPU float16: OpenAI trained and stored its models in it, it is fast on a T4, which has
        no bfloat16, and its 11 bits round less than bfloat16's 8. Models that were trained in
        bfloat16 can leave its range; what overflows is computed again.
        """
        if self.device.type != "cuda":
            return [None]
        wide = torch.cuda.is_bf16_supported(including_emulation=False)
        return [torch.float16, torch.bfloat16 if wide else None]

    def _room(self) -> int:
        """Views that surely fit into the free memory of the GPU at once."""
        if self.device.type != "cuda":
            return 1 << 30
        free, _ = torch.cuda.mem_get_info(self.device)
        # activations of a view: some 40 times its pixels in float32 in the widest models
        return max(1, free // (40 * 3 * 4 * self.image_size**2))

    @torch.no_grad()
    def encode_text(self, texts: list[str], batch: int = 256) -> Tensor:
        """Features of whole sentences: ``[N,D]``, unit norm, on the model's device.

        Prompts are cut at the longest end-of-text token of the batch: in a causal tower no row
        before the cut can see a row behind it, so the result is that of all 77 tokens.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty(0, self.embed_dim, device=self.device)
        tower = text_tower(self.model)
        features = []
        for tokens in self.tokenizer(texts).split(batch):
            eot = tokens.argmax(dim=-1)
            tokens = tokens[:, : int(eot.max()) + 1].to(self.device)
            x = tower.token_embedding(tokens)
            x = x + tower.positional_embedding[: tokens.shape[1]]
            features.append(F.normalize(run_text_tower(tower, x, eot), dim=-1))
        return torch.cat(features)

    def _check_views(self, views: Tensor) -> None:
        size = self.image_size
        if views.ndim != 4 or tuple(views.shape[1:]) != (3, size, size):
            raise ValueError(
                f"encode_views got shape {list(views.shape)}, but {self.name} takes "
                f"[V,3,{size},{size}]; let the augmenter make views of clip.image_size."
            )
        if views.dtype != torch.uint8:
            if not views.is_floating_point():
                raise ValueError(f"encode_views takes uint8 or float views, not {views.dtype}.")
            if len(views) and (views.min() < -1e-3 or views.max() > 1 + 1e-3):
                raise ValueError(
                    f"float views must lie in [0,1], these span "
                    f"[{views.min():.3g}, {views.max():.3g}]; hand over uint8 0..255 or divide by "
                    "255, and leave the normalisation to encode_views."
                )


def text_tower(model: nn.Module) -> nn.Module:
    """The module that holds token_embedding, transformer, ln_final and text_projection.

    Raises:
        ValueError: a tower that is not causal or does not pool at the end-of-text token (SigLIP,
            CoCa, Hugging Face towers): the prompt code here would be wrong for it.
    """
    tower = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None
    if (
        tower is None
        or pool not in ("argmax", "eos")
        or not causal
        or hasattr(tower, "cls_emb")
        and tower.cls_emb is not None
    ):
        raise ValueError(
            f"{type(model).__name__} has no causal text tower that pools at the end-of-text token; "
            f"choose an OpenAI model ({', '.join(OPENAI_MODELS)}) or one of the same family."
        )
    return tower


def run_text_tower(tower: nn.Module, x: Tensor, eot: Tensor) -> Tensor:
    """Embeddings with positions ``[N,L,d]``, end-of-text rows ``[N]`` -> ``[N,D]``, any norm."""
    length = x.shape[1]
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = x[torch.arange(len(x), device=x.device), eot.to(x.device)]
    return project_text(tower, tower.ln_final(x))


def project_text(tower: nn.Module, x: Tensor) -> Tensor:
    """Rows of width d to the joint space of width D."""
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


# --- the embedded model --------------------------------------------------------------------------


def build_mini(seed: int = 0, config: dict | None = None) -> open_clip.CLIP:
    """An untrained MiniCLIP: open_clip's own class from a config, weights drawn from ``seed``.

    The global random state is left as it was.
    """
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
    from safetensors.torch import save_file

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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({**tensors, "token_ids": ids}, temporary, metadata={"config": json.dumps(config)})
    temporary.replace(path)


def load_mini(path: str | Path = MINI_PATH, device: str | torch.device | None = None) -> Clip:
    """MiniCLIP from its safetensors file; embedding rows that training never saw are zero.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged; the message says how to
            rebuild it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    rebuild = "restore it with `git checkout`, or rebuild it: data/miniclip/train.py, then text.py"
    if not path.is_file():
        raise FileNotFoundError(f"the weights of MiniCLIP are not at {path}; {rebuild}.")
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        ids, rows = tensors.pop("token_ids").long(), tensors.pop("token_rows")
        with torch.device(
            "meta"
        ):  # every weight comes from the file: drawing random ones would be waste
            model = open_clip.CLIP(**config)
        table = torch.zeros(model.vocab_size, rows.shape[1])
        table[ids] = rows.float()
        state = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        model.load_state_dict({**state, "token_embedding.weight": table}, assign=True)
    except (SafetensorError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no readable MiniCLIP file ({error}); {rebuild}.") from error
    restore_causal_mask(model)
    model.mini_config = config
    return wrap(model, "mini", device=device, seen_tokens=ids)


def restore_causal_mask(model: nn.Module) -> None:
    """Fill in the mask, which no state dict holds and a model built on ``meta`` lacks."""
    length = model.context_length
    model.attn_mask = torch.full((length, length), float("-inf")).triu_(1)


def to_openai_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under OpenAI's names, as ``clip.model.build_model`` of their package takes it.

    Only for models of the OpenAI family: QuickGELU, text heads width/64, image heads 32·width/64.
    """
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    if "positional_embedding" not in state or model.logit_bias is not None:
        raise ValueError(f"{type(model).__name__} is not laid out as OpenAI's CLIP is.")
    return state


# --- loading by name -----------------------------------------------------------------------------


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
    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name == "mini":
        return load_mini(device=device)
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
        return _load_file(_openai_archive(architecture), device, name)
    except OSError as error:
        raise RuntimeError(f"{error}\nWithout a network use 'mini'.") from error


def weights_file(model: str) -> Path | None:
    """OpenAI's archive of this model, if it is where the clip package and open_clip put it."""
    source = _archive_source(model)
    path = ARCHIVES_DIR / source.filename
    return path if path.is_file() else None


def fetch_weights(model: str) -> Path | None:
    """Have OpenAI's weights on this machine; the archive, or None if open_clip's cache has them.

    Raises ``OSError`` if neither OpenAI's server nor the hub of open_clip gives them.
    """
    try:
        return weights_file(model) or _openai_archive(model)
    except OSError as error:
        try:
            config = open_clip.get_pretrained_cfg(_hyphened(model), "openai")
            open_clip.download_pretrained(config)
        except Exception as second:
            lines = str(second).strip().splitlines()
            raise OSError(f"{error}\nThe hub: {lines[0] if lines else second!r}") from second
        return None


def _openai_archive(model: str) -> Path:
    from tpt_nb.download import fetch

    return fetch(_archive_source(model), ARCHIVES_DIR, tries=3)


def _archive_source(model: str):
    """Address, name and checksum, which is part of the address."""
    from tpt_nb.download import Source

    url = open_clip.get_pretrained_cfg(_hyphened(model), "openai")["url"]
    return Source(url.rsplit("/")[-1], (url,), sha256=url.split("/")[-2])


def _hyphened(model: str) -> str:
    return model.replace("/", "-").replace("@336px", "-336")


def _load_open_clip(name: str, architecture: str, tag: str, device) -> Clip:
    """Through open_clip, with the activation that the pretrained tag was trained with."""
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in known and not Path(tag).is_file():
        raise ValueError(
            f"{architecture} has no weights {tag!r}; known tags: {', '.join(known) or 'none'}."
        )
    config = open_clip.get_pretrained_cfg(architecture, tag) or {}
    try:
        model = open_clip.create_model(
            architecture, pretrained=tag, force_quick_gelu=bool(config.get("quick_gelu"))
        )
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"could not load the weights of {name!r}: {error}. They are downloaded once; "
            "without a network use 'mini', or pass the path of a checkpoint that you have."
        ) from error
    return wrap(model, name, device=device, tokenizer=open_clip.get_tokenizer(architecture))


def _load_file(path: Path, device, name: str = "") -> Clip:
    """A local checkpoint of the OpenAI family, or a MiniCLIP file."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            if "token_rows" in file.keys():  # noqa: SIM118 (not a dict)
                return load_mini(path, device)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    elif _is_torchscript(path):
        with warnings.catch_warnings():  # torch advises torch.export, but OpenAI's files are these
            warnings.simplefilter("ignore", DeprecationWarning)
            state = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    for key in ("input_resolution", "context_length", "vocab_size"):
        state.pop(key, None)
    try:
        model = build_model_from_openai_state_dict(dict(state), cast_dtype=None).float()
        model.load_state_dict(state)  # again: the builder rounds float32 weights to float16
    except (KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of the OpenAI family ({type(error).__name__}: {error}); "
            f"for another architecture name it, as in 'ViT-B-32@{path}'."
        ) from error
    return wrap(model, name or path.name, device=device)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("constants.pkl") for entry in archive.namelist())


def wrap(
    model: nn.Module,
    name: str,
    device: str | torch.device | None = None,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    seen_tokens: Tensor | None = None,
) -> Clip:
    """Freeze an open_clip model and wrap it as a :class:`Clip`.

    Args:
        seen_tokens: ids of the tokens that training saw; a prompt with another one raises a
            warning.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = model.eval().requires_grad_(False)
    prints = {"fingerprint": weights_fingerprint(model)}
    prints["image_fingerprint"] = weights_fingerprint(model.visual)
    model = model.to(device).to(memory_format=torch.channels_last)
    size = model.visual.image_size
    return Clip(
        name=name,
        model=model,
        tokenizer=_checked_tokenizer(tokenizer or SimpleTokenizer(), name, seen_tokens),
        image_size=size[0] if isinstance(size, (tuple, list)) else int(size),
        mean=tuple(getattr(model.visual, "image_mean", None) or OPENAI_DATASET_MEAN),
        std=tuple(getattr(model.visual, "image_std", None) or OPENAI_DATASET_STD),
        device=device,
        **prints,
    )


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes and values of all weights: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _checked_tokenizer(
    base, name: str, seen_tokens: Tensor | None
) -> Callable[[list[str]], Tensor]:
    """``base`` with warnings: a text cut at 77 tokens, a token that training never saw."""
    seen = None if seen_tokens is None else {int(i) for i in seen_tokens}
    warned: set[int] = set()

    def tokenize(texts: list[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = base(texts)
        if hasattr(base, "encode"):
            full = tokens.argmax(dim=-1) == tokens.shape[1] - 1
            for i in full.nonzero().flatten().tolist():
                if len(base.encode(texts[i])) + 2 > tokens.shape[1]:
                    warnings.warn(
                        f"a text is longer than {tokens.shape[1]} tokens and was cut: "
                        f"{texts[i][:60]!r}...",
                        stacklevel=2,
                    )
        if seen is not None:
            for row in tokens:
                used = row[
                    : int(row.argmax()) + 1
                ].tolist()  # behind the end-of-text token is padding
                for token in sorted(set(used) - seen - warned):
                    warned.add(token)
                    word = base.decode([token]).strip()
                    warnings.warn(
                        f"the token {word!r} ({token}) was not in the training captions of "
                        f"{name}: its embedding is zero and the prompt means less than it says.",
                        stacklevel=2,
                    )
        return tokens

    return tokenize
