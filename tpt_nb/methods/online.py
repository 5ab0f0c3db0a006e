"""Online methods: what they learn from one image they keep for the next. Reported apart.

Same signature as the episodic ones, but a call is a *stream*: the B images are taken one after the
other, in an order that ``seed`` draws, and the prediction for an image depends on those before it.
So all images must come in one call, and a result is the mean over several orders. A function
with the attribute ``online`` is run that way by ``experiment``.

Published settings differ from data set to data set, chosen nobody knows how; here one setting, the
published one for ImageNet and ImageNet-A, serves all of them, and every method sees the same views.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tpt_nb.losses import entropy, marginal_entropy, select_confident
from tpt_nb.methods.method import Adapted, _as_mask, _back, _initial_logits, _take
from tpt_nb.models import Prompts, TemplatePrompts


class Cache:
    """Per class the ``capacity`` entries of lowest entropy: keys [C,capacity,D], values [...,C].

    An empty place has entropy infinity. ``values`` is None if the class itself is the value.
    """

    def __init__(self, classes: int, capacity: int, like: Tensor, values: bool = False) -> None:
        self.keys = like.new_zeros(classes, capacity, like.shape[-1])
        self.entropy = like.new_full((classes, capacity), torch.inf)
        self.values = like.new_zeros(classes, capacity, classes) if values else None

    def insert(self, c: int, key: Tensor, h: Tensor, value: Tensor | None = None) -> None:
        """Put an entry in place of the worst of class ``c``, if it is better."""
        worst = int(self.entropy[c].argmax())
        if h < self.entropy[c, worst]:
            self.keys[c, worst], self.entropy[c, worst] = key, h
            if value is not None:
                self.values[c, worst] = value

    def read(self, query: Tensor, beta: float) -> Tensor:
        """``exp(-beta (1 - cosine))`` of each entry, 0 for empty places: [C,capacity]."""
        affinity = torch.exp(-beta * (1 - self.keys @ query))
        return affinity.masked_fill(self.entropy.isinf(), 0)


@torch.no_grad()
def tda(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    rho: float = 0.1,
    positive_alpha: float = 2.0,
    positive_beta: float = 5.0,
    capacity: int = 3,
    negative_alpha: float = 0.117,
    negative_beta: float = 1.0,
    negative_capacity: int = 2,
    seed: int = 0,
) -> Adapted:
    """TDA: Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models", 2024.

    The confident views of an image give its base: mean logits, mean feature (not normalised again),
    marginal entropy, mean prediction. A positive cache keeps, for each predicted class, the
    ``capacity`` most certain features; a negative one keeps the mean predictions of images of
    medium entropy (0.2 to 0.5 times log2 C; in nats, as the code has it). Both are updated with
    the image *before* they are read for it. ``z += alpha exp(-beta (1 - f.k)) onehot(class)`` with
    the positive alpha and beta, ``z -= alpha exp(-beta (1 - f.k)) [0.03 < p_k < 1]`` with the
    negative ones, summed over the entries.

    ``loss`` is the marginal entropy of the base.
    """
    return _stream(
        features, prompts, rho, positive_alpha, positive_beta, capacity, 0,
        negative_alpha, negative_beta, negative_capacity, seed,
    )  # fmt: skip


@torch.no_grad()
def boostadapter(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    rho: float = 0.1,
    positive_alpha: float = 2.0,
    positive_beta: float = 5.0,
    capacity: int = 3,
    boost: int = 3,
    negative_alpha: float = 0.117,
    negative_beta: float = 1.0,
    negative_capacity: int = 2,
    seed: int = 0,
) -> Adapted:
    """BoostAdapter: Zhang et al., "BoostAdapter: Improving Vision-Language Test-Time Adaptation via
    Regional Bootstrapping", 2024.

    TDA, and the image's own confident views join the positive cache while this image is classified:
    a copy with room for ``capacity + boost`` entries per class, forgotten afterwards. In the
    published code the negative cache keeps the latest entries (an argument lands in the wrong
    place); here it keeps the most certain ones, as TDA's.
    """
    return _stream(
        features, prompts, rho, positive_alpha, positive_beta, capacity, boost,
        negative_alpha, negative_beta, negative_capacity, seed,
    )  # fmt: skip


def _stream(
    features, prompts, rho, positive_alpha, positive_beta, capacity, boost,
    negative_alpha, negative_beta, negative_capacity, seed,
) -> Adapted:  # fmt: skip
    if capacity < 1 or negative_capacity < 1:
        raise ValueError(
            f"a cache holds at least one entry per class; got capacity={capacity}, "
            f"negative_capacity={negative_capacity}."
        )
    logits = _initial_logits(features, prompts)
    x = features.to(logits)
    b, _, c = logits.shape
    chosen = select_confident(logits, rho)
    kept, keys = _take(logits, chosen), _take(x, chosen)  # [B,k,C], [B,k,D]
    base, feature = kept.mean(1), keys.mean(1)
    loss = torch.vmap(lambda z: marginal_entropy(z, 1.0))(kept)
    mean_prob, view_entropy = kept.softmax(-1).mean(1), entropy(kept)
    share = loss / math.log2(max(2, c))
    medium = (share > 0.2) & (share < 0.5)
    predicted, view_class = base.argmax(-1).tolist(), kept.argmax(-1)

    positive = Cache(c, capacity, x)
    negative = Cache(c, negative_capacity, x, values=True)
    after = base.clone()
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    for i in order.tolist():
        query = feature[i]
        positive.insert(predicted[i], query, loss[i])
        if medium[i]:
            value = ((mean_prob[i] > 0.03) & (mean_prob[i] < 1.0)).to(x)
            negative.insert(predicted[i], query, loss[i], value)
        if boost:
            after[i] += positive_alpha * _boosted(
                positive, boost, keys[i], view_class[i], view_entropy[i], query, positive_beta
            )
        else:
            after[i] += positive_alpha * positive.read(query, positive_beta).sum(1)
        weights = negative.read(query, negative_beta)
        after[i] -= negative_alpha * torch.einsum("ck,ckn->n", weights, negative.values)
    mask = _as_mask(chosen, features)
    return Adapted(*_back(features, after, logits[:, 0], loss, mask))


def _boosted(cache: Cache, boost: int, keys, classes, entropies, query, beta: float) -> Tensor:
    """What the positive cache reads with an image's own views in it: [C]."""
    read = cache.read(query, beta).sum(1)
    for c in classes.unique().tolist():  # only the classes that the views predict can change
        own = classes == c
        all_h = torch.cat([cache.entropy[c], entropies[own]])
        all_keys = torch.cat([cache.keys[c], keys[own]])
        room = cache.entropy.shape[1] + boost
        best = all_h.argsort(stable=True)[:room]
        best = best[~all_h[best].isinf()]
        read[c] = torch.exp(-beta * (1 - all_keys[best] @ query)).sum()
    return read


ONLINE: dict[str, Callable[..., Adapted]] = {"tda": tda, "boostadapter": boostadapter}
