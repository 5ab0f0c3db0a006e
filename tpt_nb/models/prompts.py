"""Prompts with a learnable context, and the text features they give.

A prompt is ``[SOT] ctx_1 .. ctx_M <class tokens> . [EOT]``; the context vectors ``ctx`` are what
CoOp (Zhou et al., "Learning to Prompt for Vision-Language Models", 2022) trains and what TPT tunes
for each test image. The text tower is causal, and that makes three savings exact: rows behind the
end-of-text token need not be computed; the tokens before the first class token are the same for
all classes and are computed once; classes with equally long names form one batch without padding.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpt_nb.models.clip import Clip, project_text, run_text_tower, text_tower
from tpt_nb.models.coop import load_coop
from tpt_nb.models.jacobian import jacobian, kept
from tpt_nb.models.packed import Packed
from tpt_nb.models.templates import clean_names
from tpt_nb.models.tokens import frame_of, name_tokens, token_lists
from tpt_nb.models.tower import LONGEST, causal_tower, has_plain_attention

POSITIONS = ("end", "middle", "front")


class Prompts:
    """One prompt per class around a learnable context.

    Args:
        clip: the model whose tokenizer and text tower are used.
        classnames: C names; underscores count as spaces.
        ctx_init: words whose embeddings start the context, or None for N(0, 0.02²) vectors. A word
            ``[CLS]`` among them is where the class name stands, as in TPT: "a photo of a [CLS]".
        n_ctx: M, the number of context vectors; needed without ``ctx_init``, else checked.
        coop: path of a CoOp checkpoint whose context is used in place of ``ctx_init``.
        class_token_position: the class name behind the context ("end"), between its halves
            ("middle") or before it ("front", also called "start"), as in CoOp.
        class_specific: a context of its own for each class.
        seed: of the random start.

    The attribute ``ctx``, ``[M,d]`` (``[C,M,d]`` if class-specific) float32, is the initial one;
    no method changes it.
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
        class_token_position = "front" if class_token_position == "start" else class_token_position
        if class_token_position not in POSITIONS:
            allowed = ", ".join(POSITIONS)
            raise ValueError(
                f"class_token_position is {class_token_position!r}; allowed: {allowed}."
            )
        self.clip, self._frame = clip, frame_of(clip.tokenizer)
        self.classnames = list(classnames)
        self.C = len(self.classnames)
        self.class_token_position = class_token_position
        self.class_specific = class_specific
        names = clean_names(self.classnames)
        self._made: dict[tuple, object] = {}
        self.n_images: int | None = None
        self.cache: Path | None = None

        self._split_at: int | None = None  # context vectors before [CLS], where ctx_init has it
        self.ctx = self._initial_context(ctx_init, n_ctx, coop, seed)
        self.M = self.ctx.shape[-2]
        # C lists: name and rest (the period), without what stands around a text
        self.tokens = name_tokens(clip.tokenizer, names, self._frame)
        limit = text_tower(clip.model).positional_embedding.shape[0]
        for name, (head, rest) in zip(self.classnames, self.tokens, strict=True):
            length = len(self._frame.start) + self.M + len(head) + len(rest) + 1
            if length > limit:
                raise ValueError(
                    f"the prompt of class {name[:60]!r} has {length} tokens, the model takes "
                    f"{limit}; shorten the class name or the context."
                )

    def expect(self, n_images: int | None = None, cache: str | Path | None = None) -> None:
        """How many images are to come in all, and a folder where a Jacobian may be kept.

        The more images, the sooner a Jacobian is worth its price; no result depends on either
        beyond rounding.
        """
        self.n_images, self.cache = n_images, None if cache is None else Path(cache)

    def text_features(self, ctx: Tensor | None = None, exact: str = "fast") -> Tensor:
        """Unit-norm text features, differentiable in ``ctx``.

        Args:
            ctx: None for the initial context, ``[M,d]`` (class-specific ``[C,M,d]``), or a batch
                of contexts ``[B,M,d]`` (``[B,C,M,d]``).
            exact: "paper" runs all 77 tokens of each prompt through open_clip's own blocks, one
                context after the other; "fast" gives the same features (see the module's text; a
                tower that is not causal, SigLIP's, has the first way only).
        Returns:
            ``[C,D]``, or ``[B,C,D]`` for a batch of contexts; the model's dtype and device.
        """
        weight = self._table
        if ctx is None and exact == "fast":
            start = self.ctx.to(weight)[None]
            return self.once("text features", lambda: self._fast_features(start)[0])
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
        table = self._table
        parts = [part.strip() for part in (ctx_init or "").replace("_", " ").split("[CLS]")]
        if len(parts) > 2 or (len(parts) == 2 and self.class_token_position == "front"):
            raise ValueError(
                f"ctx_init is {ctx_init!r}: [CLS] says where the class name stands. It may be "
                "there once, and class_token_position must then be left at end or middle."
            )
        texts = [" ".join(filter(None, parts)), parts[0]] if any(parts) else []
        words, before = token_lists(self.clip.tokenizer, texts, self._frame) if texts else ([], [])
        self._split_at = len(before) if len(parts) == 2 else None
        if n_ctx is not None and n_ctx < 1:
            raise ValueError(f"n_ctx is {n_ctx}; a context has at least one vector.")
        fixed = words and (not coop or len(parts) == 2)
        if fixed and n_ctx not in (None, len(words)):
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

    # --- paper path ------------------------------------------------------------------------------

    def _paper_features(self, ctx: Tensor) -> Tensor:
        """``[M,d]`` or ``[C,M,d]`` -> ``[C,D]``, with all 77 tokens, padding included."""
        tower = self._tower
        length = tower.positional_embedding.shape[0]
        rows, eot = [], []
        for c, tokens in enumerate(self.tokens):
            parts = self._layout(tokens, ctx[c] if self.class_specific else ctx)
            row = torch.cat([self._embed(p) if isinstance(p, list) else p for p in parts])
            eot.append(len(row) - 1)
            rows.append(torch.cat([row, self._embed([self._frame.pad] * (length - len(row)))]))
        x = torch.stack(rows) + tower.positional_embedding
        return F.normalize(run_text_tower(tower, x, torch.tensor(eot)), dim=-1)

    def _layout(self, tokens: tuple[list[int], list[int]], ctx: Tensor) -> list:
        """The prompt of one class as a list of token ids (lists) and context vectors (tensors)."""
        name, rest = tokens
        half = self._before_name()
        end = [*rest, self._frame.end]
        return [list(self._frame.start), ctx[:half], name, ctx[half:], end]

    def _before_name(self) -> int:
        """How many context vectors stand before the class name."""
        if self._split_at is not None:
            return self._split_at
        return {"end": self.M, "middle": self.M // 2, "front": 0}[self.class_token_position]

    @property
    def _tower(self) -> nn.Module:
        return text_tower(self.clip.model)

    @property
    def _table(self) -> Tensor:
        """The embeddings of the tokens ``[49408,d]``; whose dtype and device the prompts have."""
        return self._tower.token_embedding.weight

    def _embed(self, ids: list[int]) -> Tensor:
        table = self._table
        return table[torch.tensor(ids, dtype=torch.long, device=table.device)]

    @property
    def ctx(self) -> Tensor:
        """The initial context: ``[M,d]``, class-specific ``[C,M,d]``.

        To start elsewhere assign another one (to a ``copy.copy``, if the old is still needed):
        what was made once for the old start is then dropped. A change in place is not noticed.
        """
        return self._ctx

    @ctx.setter
    def ctx(self, value: Tensor) -> None:
        kept = {k: v for k, v in self._made.items() if k[0] in ("suffixes", "packed")}
        self._ctx, self._made = value, kept  # a dictionary of its own: copies share the old one

    # --- fast path -------------------------------------------------------------------------------

    def _fast_features(self, ctx: Tensor) -> Tensor:
        """``[B,M,d]`` or ``[B,C,M,d]`` -> ``[B,C,D]``."""
        tower = self._tower
        if not has_plain_attention(tower):  # rare variants, and towers that are not causal
            return torch.stack([self._paper_features(one) for one in ctx])
        return F.normalize(project_text(tower, self.rows(ctx)), dim=-1)

    def rows(self, ctx: Tensor) -> Tensor:
        """End-of-text rows behind the last layer norm, of width d; the projection makes features.

        ``[B,M,d]`` (class-specific ``[B,C,M,d]``) -> ``[B,C,d]``, in the dtype of the model.
        """
        tower = self._tower
        prefix, suffixes, order = self._split(ctx)
        if torch.is_grad_enabled() and (ctx.requires_grad or tower.ln_final.weight.requires_grad):
            return causal_tower(tower, prefix, suffixes)[:, order]
        packed = self._packed(suffixes, order)
        return packed(prefix) if packed else causal_tower(tower, prefix, suffixes)[:, order]

    def _split(self, ctx: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The prefix ``[B,P,d]``, the suffixes in groups of equal length, and the classes' places.

        Suffixes ``[B or 1,C_g,S_g,d]``; ``order [C]`` says where each class stands in the groups.
        """
        prefix = self._embed(list(self._frame.start)).expand(len(ctx), 1, -1)
        if not self.class_specific:  # else the start token alone is common to all classes
            prefix = torch.cat([prefix, ctx[:, : self._before_name()]], dim=1)
        position = self._tower.positional_embedding
        prefix = prefix + position[: prefix.shape[1]]
        if self.fixed_suffixes:
            return prefix, *self.once("suffixes", lambda: self._suffixes(None))
        return prefix, *self._suffixes(ctx)

    def _suffixes(self, ctx: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The suffixes and the order; ``ctx`` is None where none of it stands in a suffix."""
        half, eot = self._before_name(), self._frame.end
        offset = 1 + (0 if self.class_specific else half)
        position = self._tower.positional_embedding
        groups: dict[tuple[int, int], list[int]] = {}
        for c, (name, rest) in enumerate(self.tokens):
            groups.setdefault((len(name), len(rest)), []).append(c)
        suffixes = []
        for members in groups.values():
            name = self._embed([self.tokens[c][0] for c in members]).unsqueeze(0)
            rest = self._embed([[*self.tokens[c][1], eot] for c in members]).unsqueeze(0)
            parts = [name, rest]
            if ctx is not None:
                own = ctx[:, members] if self.class_specific else ctx.unsqueeze(1)
                before = own[..., : half if self.class_specific else 0, :]
                parts = [p for p in (before, name, own[..., half:, :], rest) if p.shape[2]]
            batch = max(p.shape[0] for p in parts)  # 1 if no context stands in the suffix
            x = torch.cat([p.expand(batch, len(members), -1, -1) for p in parts], dim=2)
            suffixes.append(x + position[offset : offset + x.shape[2]])
        order = torch.tensor([c for members in groups.values() for c in members]).argsort()
        return suffixes, order.to(position.device)

    @property
    def fixed_suffixes(self) -> bool:
        """Do all context tokens stand before the class name, and are they common to the classes?"""
        return self._before_name() == self.M and not self.class_specific

    def _packed(self, suffixes: list[Tensor], order: Tensor) -> Packed | None:
        """The suffixes laid out for passes without gradient; None where that does not pay."""
        longest = max(x.shape[2] for x in suffixes)
        if not self.fixed_suffixes or suffixes[0].is_cuda or longest > LONGEST:
            return None
        return self.once("packed", lambda: Packed(self._tower, suffixes, order))

    def once(self, what: str, make: Callable):
        """What ``make`` gives, made once; it must depend on the prompts, their initial context and
        the frozen model only.

        While the model is trained, it is made each time.
        """
        weight = self._table
        if weight.requires_grad:  # not frozen: somebody trains it
            return make()
        key = (what, weight.dtype, weight.device)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def jacobian(self, cache: str | Path | None = None) -> Tensor:
        """Derivative of the end-of-text rows in the context, at the initial one.

        Computed once and kept: ``[C,d,M*d]``, which is 4 (float32) x C x d x M x d bytes. The rows
        are those behind the last layer norm, of width d; projection and normalisation follow.

        Args:
            cache: folder in which it is kept for other processes too; None: only here.
        Raises:
            ValueError: the class name does not stand at the end, or contexts are class-specific.
        """
        if not self.has_jacobian:
            raise ValueError(
                "the Jacobian of the text features needs one context for all classes, in front of "
                f"the class name, and a tower of OpenAI's kind; this one has class_token_position="
                f"{self.class_token_position!r} and class_specific={self.class_specific}."
            )
        return self.once("jacobian", lambda: self._read_or_make_jacobian(cache))

    @property
    def has_jacobian(self) -> bool:
        """Can :meth:`jacobian` be asked for?"""
        return self.fixed_suffixes and has_plain_attention(self._tower)

    def _read_or_make_jacobian(self, cache: str | Path | None) -> Tensor:
        if cache is None:
            return self._make_jacobian()
        about = [
            self.clip.fingerprint,
            self.tokens,
            str(self._table.dtype),
            self._table.device.type,
        ]
        key = hashlib.sha256(json.dumps(about).encode())
        key.update(self.ctx.detach().cpu().numpy().tobytes())
        path = Path(cache) / "jacobians" / f"{key.hexdigest()[:20]}.safetensors"
        return kept(path, self._make_jacobian, self._table.device)

    def _make_jacobian(self) -> Tensor:
        tower = self._tower
        with torch.no_grad():
            prefix, suffixes, order = self._split(self.ctx.to(tower.token_embedding.weight)[None])
        with torch.enable_grad():
            return jacobian(tower, prefix[0], suffixes, order)
