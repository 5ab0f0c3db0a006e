"""Prompts with a learnable context, and the text features they give.

A prompt is ``[SOT] ctx_1 .. ctx_M <class tokens> . [EOT]``; the context vectors ``ctx`` are what
CoOp (Zhou et al., "Learning to Prompt for Vision-Language Models", 2022) trains and what TPT tunes
for each test image. The text tower is causal, and that makes three savings exact: rows behind the
end-of-text token need not be computed; the tokens before the first class token are the same for
all classes and are computed once; classes with equally long names form one batch without padding.
"""

import math
import pickle
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tpt_nb.clip import Clip, project_text, run_text_tower, text_tower

TEMPLATES = {
    "single": ["a photo of a {}."],
    "seven": [  # the selection of Tip-Adapter from OpenAI's 80 templates
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ],
}
POSITIONS = ("end", "middle", "front")


class Prompts:
    """One prompt per class around a learnable context.

    Args:
        clip: the model whose tokenizer and text tower are used.
        classnames: C names; underscores count as spaces.
        ctx_init: words whose embeddings start the context, or None for N(0, 0.02²) vectors.
        n_ctx: M, the number of context vectors; needed without ``ctx_init``, else checked.
        coop: path of a CoOp checkpoint whose context is used in place of ``ctx_init``.
        class_token_position: the class name behind the context ("end"), between its halves
            ("middle") or before it ("front"), as in CoOp.
        class_specific: a context of its own for each class.
        seed: of the random start.

    Attributes:
        ctx: ``[M,d]`` (``[C,M,d]`` if class-specific) float32: the initial context, never changed.
        classnames, C, M: as above.
    """

    def __init__(
        self,
        clip: Clip,
        classnames: list[str],
        ctx_init: str | None = "a photo of a",
        n_ctx: int | None = None,
        coop: str | Path | None = None,
        class_token_position: str = "end",
        class_specific: bool = False,
        seed: int = 0,
    ) -> None:
        if class_token_position not in POSITIONS:
            raise ValueError(
                f"class_token_position is {class_token_position!r}; allowed: "
                f"{', '.join(POSITIONS)}."
            )
        self.clip = clip
        self.classnames = list(classnames)
        self.C = len(self.classnames)
        self.class_token_position = class_token_position
        self.class_specific = class_specific
        names = [_clean(name) for name in self.classnames]
        _check_names(names)

        self.ctx = self._initial_context(ctx_init, n_ctx, coop, seed)
        self.M = self.ctx.shape[-2]
        self.tokens = self._tokenize(names)  # C lists: name and rest (the period), no SOT or EOT
        limit = text_tower(clip.model).positional_embedding.shape[0]
        for name, (head, rest) in zip(self.classnames, self.tokens, strict=True):
            length = 2 + self.M + len(head) + len(rest)
            if length > limit:
                raise ValueError(
                    f"the prompt of class {name[:60]!r} has {length} tokens, the model takes "
                    f"{limit}; shorten the class name or the context."
                )

    def text_features(self, ctx: Tensor | None = None, exact: str = "fast") -> Tensor:
        """Unit-norm text features, differentiable in ``ctx``.

        Args:
            ctx: None for the initial context, ``[M,d]`` (class-specific ``[C,M,d]``), or a batch
                of contexts ``[B,M,d]`` (``[B,C,M,d]``).
            exact: "paper" runs all 77 tokens of each prompt through open_clip's own blocks, one
                context after the other; "fast" gives the same features (see the module's text).
        Returns:
            ``[C,D]``, or ``[B,C,D]`` for a batch of contexts; the model's dtype and device.
        """
        weight = text_tower(self.clip.model).token_embedding.weight
        ctx = (self.ctx if ctx is None else ctx).to(weight)
        shape = (self.C, *self.ctx.shape[-2:]) if self.class_specific else tuple(self.ctx.shape)
        if tuple(ctx.shape[-len(shape) :]) != shape or ctx.ndim > len(shape) + 1:
            raise ValueError(
                f"the context has shape {list(ctx.shape)}, expected {list(shape)} or "
                f"{['B', *shape]} for {self.C} classes."
            )
        batched = ctx.ndim == len(shape) + 1
        contexts = ctx if batched else ctx.unsqueeze(0)
        if exact == "paper":
            features = torch.stack([self._paper_features(one) for one in contexts])
        elif exact == "fast":
            features = self._fast_features(contexts)
        else:
            raise ValueError(f"exact is {exact!r}; allowed: fast, paper.")
        return features if batched else features[0]

    # --- construction ----------------------------------------------------------------------------

    def _initial_context(self, ctx_init, n_ctx, coop, seed) -> Tensor:
        table = text_tower(self.clip.model).token_embedding.weight
        words = _token_lists(self.clip, [_clean(ctx_init)])[0] if ctx_init else []
        if n_ctx is not None and n_ctx < 1:
            raise ValueError(f"n_ctx is {n_ctx}; a context has at least one vector.")
        if not coop and words and n_ctx not in (None, len(words)):
            raise ValueError(
                f"ctx_init {ctx_init!r} has {len(words)} tokens but n_ctx is {n_ctx}; pass "
                "ctx_init=None for a random start, or leave n_ctx out."
            )
        m = n_ctx or len(words)
        if m == 0:
            raise ValueError("without ctx_init the number of context vectors n_ctx is needed.")
        if coop:
            ctx = load_coop(coop, m, self.clip.ctx_dim, self.C if self.class_specific else None)
            return ctx.to(table.device)
        if words:
            ctx = table[torch.tensor(words, device=table.device)].float()
            return ctx.expand(self.C, -1, -1).clone() if self.class_specific else ctx.clone()
        shape = (self.C, m, table.shape[1]) if self.class_specific else (m, table.shape[1])
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * 0.02).to(table.device)

    def _tokenize(self, names: list[str]) -> list[tuple[list[int], list[int]]]:
        """Tokens of "name." split behind the name, as CoOp does: the sentence decides."""
        sentences = _token_lists(self.clip, [f"{name}." for name in names])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sentences have warned of the same tokens
            lengths = [len(tokens) for tokens in _token_lists(self.clip, names)]
        return [(s[:n], s[n:]) for s, n in zip(sentences, lengths, strict=True)]

    # --- paper path ------------------------------------------------------------------------------

    def _paper_features(self, ctx: Tensor) -> Tensor:
        """``[M,d]`` or ``[C,M,d]`` -> ``[C,D]``, with all 77 tokens, padding included."""
        tower = text_tower(self.clip.model)
        length = tower.positional_embedding.shape[0]
        rows, eot = [], []
        for c, tokens in enumerate(self.tokens):
            parts = self._layout(tokens, ctx[c] if self.class_specific else ctx)
            row = torch.cat([self._embed(p) if isinstance(p, list) else p for p in parts])
            eot.append(len(row) - 1)
            rows.append(torch.cat([row, self._embed([0] * (length - len(row)))]))
        x = torch.stack(rows) + tower.positional_embedding
        return F.normalize(run_text_tower(tower, x, torch.tensor(eot)), dim=-1)

    def _layout(self, tokens: tuple[list[int], list[int]], ctx: Tensor) -> list:
        """The prompt of one class as a list of token ids (lists) and context vectors (tensors)."""
        name, rest = tokens
        sot, eot = self._special
        half = self._before_name()
        return [[sot], ctx[:half], name, ctx[half:], [*rest, eot]]

    def _before_name(self) -> int:
        """How many context vectors stand before the class name."""
        return {"end": self.M, "middle": self.M // 2, "front": 0}[self.class_token_position]

    @property
    def _special(self) -> tuple[int, int]:
        row = self.clip.tokenizer([""])[0]
        return int(row[0]), int(row.max())

    def _embed(self, ids: list[int]) -> Tensor:
        table = text_tower(self.clip.model).token_embedding.weight
        return table[torch.tensor(ids, dtype=torch.long, device=table.device)]

    # --- fast path -------------------------------------------------------------------------------

    def _fast_features(self, ctx: Tensor) -> Tensor:
        """``[B,M,d]`` or ``[B,C,M,d]`` -> ``[B,C,D]``."""
        tower = text_tower(self.clip.model)
        if not all(isinstance(b.attn, nn.MultiheadAttention) for b in tower.transformer.resblocks):
            return torch.stack(
                [self._paper_features(one) for one in ctx]
            )  # rare attention variants
        position = tower.positional_embedding
        sot, eot = self._special
        half = self._before_name()
        start = self._embed([sot]).expand(len(ctx), 1, -1)
        if self.class_specific:  # the start token alone is common to all classes
            prefix, half_in_suffix = start, half
        else:
            prefix, half_in_suffix = torch.cat([start, ctx[:, :half]], dim=1), 0
        prefix = prefix + position[: prefix.shape[1]]

        groups: dict[tuple[int, int], list[int]] = {}
        for c, (name, rest) in enumerate(self.tokens):
            groups.setdefault((len(name), len(rest)), []).append(c)
        suffixes = []
        for members in groups.values():
            name = self._embed([self.tokens[c][0] for c in members]).unsqueeze(0)
            rest = self._embed([[*self.tokens[c][1], eot] for c in members]).unsqueeze(0)
            own = ctx[:, members] if self.class_specific else ctx.unsqueeze(1)
            parts = [own[..., :half_in_suffix, :], name, own[..., half:, :], rest]
            parts = [p for p in parts if p.shape[2]]
            batch = max(p.shape[0] for p in parts)  # 1 if no context stands in the suffix
            x = torch.cat([p.expand(batch, len(members), -1, -1) for p in parts], dim=2)
            suffixes.append(x + position[prefix.shape[1] : prefix.shape[1] + x.shape[2]])

        features = F.normalize(causal_tower(tower, prefix, suffixes), dim=-1)
        order = torch.tensor([c for members in groups.values() for c in members])
        return features[:, order.argsort().to(features.device)]


def causal_tower(tower: nn.Module, prefix: Tensor, suffixes: list[Tensor]) -> Tensor:
    """Text features of many prompts that share a prefix, without computing anything twice.

    Args:
        tower: open_clip's text tower, with fused attention.
        prefix: ``[B,P,d]`` embedded tokens common to all classes, positions added.
        suffixes: for each group of equally long suffixes ``[B or 1,C_g,S_g,d]``; the last token
            is the end-of-text token.
    Returns:
        ``[B,C,D]``, classes in the order of the groups, not normalised.
    """
    sizes = [(x.shape[1], x.shape[2]) for x in suffixes]
    x = torch.cat([s.flatten(1, 2).expand(max(map(len, suffixes)), -1, -1) for s in suffixes], 1)
    blocks = list(tower.transformer.resblocks)
    for i, block in enumerate(blocks):
        last = i == len(blocks) - 1  # there, only the end-of-text rows are asked for
        queries = _end_rows(x, sizes) if last else x
        prefix_qkv = _project(block, prefix, "qkv")
        k, v = _project(block, x, "kv")
        q = _project(block, queries, "q")[0]
        mixed = _attend_suffix(q, k, v, prefix_qkv[1], prefix_qkv[2], sizes, last)
        x = _finish(block, queries, mixed)
        if not last:
            prefix = _finish(block, prefix, _attend_causal(*prefix_qkv))
    return project_text(tower, tower.ln_final(x))


def _end_rows(x: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """The last row of each suffix: ``[B,T,d] -> [B,C,d]``."""
    parts = x.split([c * s for c, s in sizes], dim=1)
    return torch.cat([p.unflatten(1, cs)[:, :, -1] for p, cs in zip(parts, sizes, strict=True)], 1)


def _project(block: nn.Module, x: Tensor, which: str) -> list[Tensor]:
    """Queries, keys or values: ``[B,T,d]`` -> one ``[B,h,T,e]`` per letter of ``which``."""
    attention = block.attn
    width = attention.embed_dim
    first = "qkv".index(which[0]) * width
    rows = slice(first, first + len(which) * width)
    y = F.linear(block.ln_1(x), attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    y = y.unflatten(-1, (len(which), attention.num_heads, -1))  # [B,T,n,h,e]
    return [t.transpose(1, 2) for t in y.unbind(2)]


def _attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal self-attention of ``[B,h,T,e]`` -> ``[B,T,h*e]``."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores + _causal_mask(scores)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def _causal_mask(scores: Tensor) -> Tensor:
    return torch.full_like(scores[(0,) * (scores.ndim - 2)], float("-inf")).triu(1)


def _attend_suffix(q, k, v, k_prefix, v_prefix, sizes, last: bool) -> Tensor:
    """Each suffix attends to the prefix and causally to itself: -> ``[B,T,h*e]``.

    ``q, k, v`` are ``[B or 1,h,T,e]`` (``q`` is ``[.,h,C,e]`` in the last block), the prefix
    ``[B,h,P,e]``.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    n_prefix = k_prefix.shape[2]
    to_prefix = (q * scale) @ k_prefix.transpose(-1, -2)  # [B,h,T,P]
    batch = to_prefix.shape[0]
    k_parts = k.split([c * s for c, s in sizes], dim=2)
    v_parts = v.split([c * s for c, s in sizes], dim=2)
    q_sizes = [(c, 1) if last else (c, s) for c, s in sizes]
    q_parts = q.split([c * s for c, s in q_sizes], dim=2)
    prefix_parts = to_prefix.split([c * s for c, s in q_sizes], dim=2)
    weights_prefix, from_suffix = [], []
    for q_g, k_g, v_g, p_g, size, q_size in zip(
        q_parts, k_parts, v_parts, prefix_parts, sizes, q_sizes, strict=True
    ):
        q_g, k_g, v_g = q_g.unflatten(2, q_size), k_g.unflatten(2, size), v_g.unflatten(2, size)
        own = (q_g * scale) @ k_g.transpose(-1, -2)  # [B,h,C,S,S]
        if not last:
            own = own + _causal_mask(own)
        scores = torch.cat([p_g.unflatten(2, q_size), own.expand(batch, -1, -1, -1, -1)], dim=-1)
        weights = scores.softmax(dim=-1)
        weights_prefix.append(weights[..., :n_prefix].flatten(2, 3))
        from_suffix.append((weights[..., n_prefix:] @ v_g).flatten(2, 3))
    out = torch.cat(weights_prefix, dim=2) @ v_prefix + torch.cat(from_suffix, dim=2)
    return out.transpose(1, 2).flatten(2)


def _finish(block: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a residual block behind the attention."""
    x = x + block.ls_1(block.attn.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


class TemplatePrompts:
    """Fixed text features of a template ensemble, for the methods that tune nothing.

    Has the attributes of :class:`Prompts` that such methods use; ``ctx`` is None.
    """

    ctx = None

    def __init__(self, clip: Clip, classnames: list[str], templates: str | list[str]) -> None:
        self.clip = clip
        self.classnames = list(classnames)
        self.C = len(self.classnames)
        self._features = template_features(clip, self.classnames, templates)

    def text_features(self, ctx: None = None, exact: str = "fast") -> Tensor:
        """``[C,D]`` unit norm."""
        if ctx is not None:
            raise ValueError("a template ensemble has no context; use Prompts.")
        return self._features


def template_features(clip: Clip, classnames: list[str], templates: str | list[str]) -> Tensor:
    """Text features of an ensemble: ``[C,D]``, unit norm.

    Each sentence is encoded and normalised, then the mean over the templates is normalised.

    Args:
        templates: a key of ``TEMPLATES`` or sentences with one ``{}`` for the class name.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ValueError(f"unknown templates {templates!r}; known: {', '.join(TEMPLATES)}.")
        templates = TEMPLATES[templates]
    bad = [t for t in templates if t.count("{}") != 1]
    if bad or not templates:
        raise ValueError(f"each template needs one {{}} for the class name; got {bad or 'none'}.")
    names = [_clean(name) for name in classnames]
    _check_names(names)
    texts = [template.format(name) for name in names for template in templates]
    features = clip.encode_text(texts).unflatten(0, (len(names), len(templates)))
    return F.normalize(features.mean(dim=1), dim=-1)


def _clean(name: str) -> str:
    return name.replace("_", " ").strip()


def _check_names(names: list[str]) -> None:
    if not names:
        raise ValueError("there are no class names.")
    empty = [i for i, name in enumerate(names) if not name]
    if empty:
        raise ValueError(f"class names {empty[:5]} are empty.")


def _token_lists(clip: Clip, texts: list[str]) -> list[list[int]]:
    """Token ids of each text without start, end and padding."""
    return [row[1 : int(row.argmax())].tolist() for row in clip.tokenizer(texts)]


# --- CoOp ----------------------------------------------------------------------------------------


class _Inert:
    """Stands for any class that a checkpoint names and we do not need; does nothing."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


def load_coop(path: str | Path, M: int, d: int, n_classes: int | None = None) -> Tensor:
    """The context of a CoOp checkpoint, float32 on the CPU.

    Only ``state_dict["ctx"]`` is used; the token buffers belong to the classes of the training.
    Nothing in the file is executed: the checkpoints of CoOp's trainer also hold optimiser and
    scheduler objects, and every class but tensors is replaced by one that does nothing.

    Args:
        M, d: the number and width of context vectors that the prompts need.
        n_classes: C for a class-specific context ``[C,M,d]``, None for a shared one ``[M,d]``.
    Raises:
        FileNotFoundError, ValueError: no file, another layout, other M, width or C.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no CoOp checkpoint at {path}.")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects that cannot be read without running code from the file. If you "
            "trust it, load it yourself and write the context alone with prompts.save_coop."
        ) from error
    except (ValueError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no readable torch checkpoint: {error}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    ctx = state.get("ctx") if isinstance(state, dict) else None
    if not isinstance(ctx, Tensor):
        keys = list(checkpoint)[:6] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} is not laid out as CoOp's checkpoints are: expected state_dict['ctx'], "
            f"found {keys}."
        )
    expected = (M, d) if n_classes is None else (n_classes, M, d)
    if tuple(ctx.shape) == expected:
        return ctx.float()
    raise ValueError(f"{path} {_coop_mismatch(tuple(ctx.shape), expected)}")


def _coop_mismatch(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Why a context of ``shape`` does not fit, and what to do."""
    text = f"holds a context of shape {list(shape)}, expected {list(expected)}: "
    if len(shape) != len(expected):
        kind = "class-specific" if len(shape) == 3 else "shared by the classes"
        return text + f"it is {kind}; set class_specific={len(shape) == 3}."
    if shape[-1] != expected[-1]:
        return text + (
            f"it was trained for a text tower of width {shape[-1]}, this model has {expected[-1]}; "
            "take a checkpoint of the same model."
        )
    if shape[-2] != expected[-2]:
        return text + f"it has M={shape[-2]} context vectors; pass n_ctx={shape[-2]}."
    return text + f"it was trained for {shape[0]} classes."


def save_coop(path: str | Path, ctx: Tensor, epoch: int) -> None:
    """Write a context in the layout of CoOp's checkpoints, float16 as theirs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"state_dict": {"ctx": ctx.detach().cpu().half()}, "epoch": epoch}, temporary)
    temporary.replace(path)


def train_coop(
    clip: Clip,
    features: Tensor,
    targets: Tensor,
    classnames: list[str],
    n_ctx: int | None = None,
    ctx_init: str | None = "a photo of a",
    epochs: int = 50,
    lr: float = 0.002,
    batch: int = 32,
    seed: int = 0,
    progress: bool = True,
    class_token_position: str = "end",
    class_specific: bool = False,
) -> Tensor:
    """Train a context with CoOp's recipe on encoded images (the image encoder is frozen).

    SGD with momentum 0.9 and weight decay 5e-4; one warm-up epoch at 1e-5, then a cosine from
    ``lr``; cross-entropy over ``exp(scale) * cos``.

    Args:
        features: ``[N,D]`` unit norm, or ``[N,A,D]`` with A augmented views of each image, of
            which every epoch draws one.
        targets: ``[N]`` class indices.
        n_ctx, ctx_init, class_token_position, class_specific, seed: see :class:`Prompts`; with
            ``n_ctx`` given and ``ctx_init=None`` the start is random.
    Returns:
        the context, ``[M,d]`` or ``[C,M,d]``, float32 on the CPU.
    Raises:
        ValueError: shapes that do not fit together.
    """
    features = features.unsqueeze(1) if features.ndim == 2 else features
    if features.ndim != 3 or len(features) != len(targets) or len(features) == 0:
        raise ValueError(
            f"features are {list(features.shape)} and targets {list(targets.shape)}; expected "
            "[N,D] or [N,A,D] and [N] with N > 0."
        )
    if int(targets.min()) < 0 or int(targets.max()) >= len(classnames):
        raise ValueError(
            f"targets span {int(targets.min())}..{int(targets.max())}, but there are "
            f"{len(classnames)} class names."
        )
    prompts = Prompts(
        clip,
        classnames,
        ctx_init,
        n_ctx,
        class_token_position=class_token_position,
        class_specific=class_specific,
        seed=seed,
    )
    weight = text_tower(clip.model).token_embedding.weight
    features, targets = features.to(weight), targets.to(weight.device)
    ctx = prompts.ctx.to(weight).clone().requires_grad_(True)
    optimizer = torch.optim.SGD([ctx], lr=lr, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(seed)
    n, n_views = features.shape[:2]
    bar = tqdm(range(epochs), desc="CoOp", unit="epoch", disable=None if progress else True)
    for epoch in bar:
        cosine = 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        optimizer.param_groups[0]["lr"] = 1e-5 if epoch == 0 else cosine
        order = torch.randperm(n, generator=generator)
        view = torch.randint(n_views, (n,), generator=generator)
        total, steps = 0.0, 0
        for index in order.split(batch):
            if len(index) < batch and steps:  # a short last batch is dropped, as CoOp's loader does
                break
            x = features[index, view[index]]
            logits = clip.logit_scale * x @ prompts.text_features(ctx).T
            loss = F.cross_entropy(logits, targets[index.to(targets.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
        bar.set_postfix(loss=f"{total / steps:.3f}")
    return ctx.detach().float().cpu()
