"""A CLIP with everything needed to feed it: views and sentences to unit-norm features."""

import functools
import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpt_nb.core.machine import has_gpu

OPENAI_MODELS = (
    "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64",
    "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px",
)  # fmt: skip
SOT, EOT = 49406, 49407  # tokens
# of the images that OpenAI trained on, per channel, in [0,1]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Clip:
    """A frozen CLIP with everything needed to feed it.

    ``model`` is an open_clip model in eval mode without gradients, ``tokenizer`` maps a list of
    sentences to token ids ``[N,77]`` (SigLIP ``[N,64]``, long), ``mean`` and ``std`` are
    per-channel statistics of images in [0,1]. ``fingerprint`` is a hash of the weights,
    ``image_fingerprint`` of those of the image tower (part of the key of the feature cache: another
    text tower, the same features). ``max_views`` is set when a pass ran out of memory: no later one
    is larger.
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
        projection = text_tower(self.model).text_projection
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

    @property
    def logit_bias(self) -> Tensor:
        """What a model with sigmoid scores (SigLIP) adds to its logits; 0 for all others.

        ``sigmoid(logit_scale * cosine + logit_bias)`` is its probability that a picture and a
        sentence belong together. Methods here leave it out: see :func:`tpt_nb.models.load`.
        """
        bias = getattr(self.model, "logit_bias", None)
        if bias is None:
            return torch.zeros((), device=self.device)
        return bias.detach().float().squeeze()

    @torch.no_grad()
    def encode_views(self, views: Tensor, batch: int = 256, checked: bool = True) -> Tensor:
        """Features of views that already have the model's image size.

        Args:
            views: ``[V,3,H,W]``, uint8 in 0..255 or float in [0,1]; normalised here.
            batch: views per pass of the image encoder, at most; on a GPU fewer where memory is
                short, and half as many after a pass that ran out of it.
            checked: see :meth:`encode_pass`.
        Returns:
            ``[V,D]`` float32, unit norm, on the model's device.
        Raises:
            ValueError: wrong shape, size or range.
            RuntimeError: not even one view fits into memory.
        """
        self._check_views(views)
        if not len(views):
            return torch.empty(0, self.embed_dim, device=self.device)
        features, done = [], 0
        step = min(batch, self.max_views or batch, self._room())
        while done < len(views):
            try:
                features.append(self.encode_pass(views[done : done + step], checked))
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
        return torch.cat(features)

    def encode_pass(self, views: Tensor, checked: bool = True) -> Tensor:
        """One pass of the image encoder, with gradients: ``[V,3,S,S]`` -> ``[V,D]``, unit norm.

        ``checked``: on a GPU, wait for the pass to see whether it overflowed in half precision, and
        compute it again if so; False: whoever asked looks for numbers that are not finite.
        """
        x = self._normalised(views.to(self.device, non_blocking=True))
        for amp in self._precisions():
            kind = self.device.type
            with torch.autocast(kind, amp or torch.bfloat16, enabled=amp is not None):
                features = self.model.encode_image(x).float()
            if amp != torch.float16 or not checked or features.isfinite().all():
                break
        return F.normalize(features, dim=-1)

    def _normalised(self, views: Tensor) -> Tensor:
        """``[V,3,S,S]`` in the dtype of the weights, channels_last, as the image tower wants it."""
        dtype = next(self.model.parameters()).dtype
        pixels = views.shape[2] * views.shape[3]
        # statistics as long as a view: with three numbers a loop has three steps
        mean, std = (
            torch.tensor(values, device=self.device, dtype=dtype).repeat(pixels)
            for values in (self.mean, self.std)
        )
        x = views.permute(0, 2, 3, 1).flatten(1).to(dtype)
        x = x.div_(255) if views.dtype == torch.uint8 else x
        return (x - mean).div_(std).unflatten(1, (*views.shape[2:], 3)).permute(0, 3, 1, 2)

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
        before the cut can see a row behind it, so the result is that of all 77 tokens. In a tower
        that is not causal (SigLIP) every token sees the padding, and nothing is cut.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty(0, self.embed_dim, device=self.device)
        tower = text_tower(self.model)
        features = []
        for tokens in self.tokenizer(texts).split(batch):
            eot = tokens.argmax(dim=-1)
            length = tokens.shape[1] if tower.attn_mask is None else int(eot.max()) + 1
            tokens = tokens[:, :length].to(self.device)
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
        ValueError: a tower that neither is causal and pools at the end-of-text token, nor sees all
            tokens and pools the last of them as SigLIP's does (CoCa, Hugging Face towers): the
            prompt code here would be wrong for it.
    """
    tower = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None
    plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
    pools = ("argmax", "eos") if causal else ("last",)
    if not hasattr(tower, "token_embedding") or not plain or pool not in pools:
        raise ValueError(
            f"{type(model).__name__} has no causal text tower that pools at the end-of-text token, "
            "nor SigLIP's, which pools the last token; "
            f"choose an OpenAI model ({', '.join(OPENAI_MODELS)}) or one of the same family."
        )
    return tower


def run_text_tower(tower: nn.Module, x: Tensor, eot: Tensor) -> Tensor:
    """Embeddings with positions ``[N,L,d]``, end-of-text rows ``[N]`` -> ``[N,D]``, any norm.

    A tower that is not causal gives its last row, whatever ``eot``; L must be all of its tokens.
    """
    length, mask = x.shape[1], tower.attn_mask
    if mask is None:
        x = tower.transformer(x)[:, -1]
    else:
        x = tower.transformer(x, attn_mask=mask[:length, :length])
        x = x[torch.arange(len(x), device=x.device), eot.to(x.device)]
    return project_text(tower, tower.ln_final(x))


def project_text(tower: nn.Module, x: Tensor) -> Tensor:
    """Rows of width d to the joint space of width D."""
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


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
    device = torch.device(device or ("cuda" if has_gpu() else "cpu"))
    model = model.eval().requires_grad_(False)
    prints = {"fingerprint": weights_fingerprint(model)}
    prints["image_fingerprint"] = weights_fingerprint(model.visual)
    model = model.to(device).to(memory_format=torch.channels_last)
    size = model.visual.image_size
    return Clip(
        name=name,
        model=model,
        tokenizer=checked_tokenizer(tokenizer or simple_tokenizer(), name, seen_tokens),
        image_size=size[0] if isinstance(size, (tuple, list)) else int(size),
        mean=tuple(getattr(model.visual, "image_mean", None) or MEAN),
        std=tuple(getattr(model.visual, "image_std", None) or STD),
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


@functools.cache
def simple_tokenizer() -> Callable[[list[str]], Tensor]:
    """OpenAI's tokenizer: open_clip's, of the one file that has it where nobody needs the rest."""
    if "open_clip" not in sys.modules:
        package = importlib.util.find_spec("open_clip")  # does not import it
        path = Path(package.origin).with_name("tokenizer.py") if package else None
        if path and path.is_file():
            spec = importlib.util.spec_from_file_location(f"{__name__}_tokenizer", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.SimpleTokenizer()
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def checked_tokenizer(base, name: str, seen_tokens: Tensor | None) -> Callable:
    """``base`` with warnings: a text cut at 77 tokens, a token that training never saw."""
    seen = None if seen_tokens is None else {int(i) for i in seen_tokens}
    warned: set[int] = set()

    def warn_of_cuts(texts: list[str], tokens: Tensor) -> None:
        length = tokens.shape[1]
        full = tokens.argmax(dim=-1) == length - 1
        for i in full.nonzero().flatten().tolist():
            if len(base.encode(texts[i])) + 2 > length:
                text = f"a text is longer than {length} tokens and was cut: {texts[i][:60]!r}..."
                warnings.warn(text, stacklevel=3)

    def tokenize(texts: list[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = base(texts)
        if hasattr(base, "encode"):  # a tokenizer of Hugging Face may have none
            warn_of_cuts(texts, tokens)
        for row in tokens if seen is not None else ():
            used = row[: int(row.argmax()) + 1].tolist()  # behind the end-of-text token is padding
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
