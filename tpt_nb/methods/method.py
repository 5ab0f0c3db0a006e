"""What a method is: a function of features, prompts and options that describes itself.

Here is also what the methods' files share: options with their checks, and small tensor helpers.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tpt_nb.core.messages import unknown
from tpt_nb.models import Clip, Prompts, TemplatePrompts, text_tower

KINDS = ("episodic", "online", "transductive")
TUNES = ("nothing", "context", "text", "encoder")


@dataclass
class Adapted:
    """What a method did to B images; on the device of the features.

    Attributes:
        logits: ``[B,C]`` after adaptation; their argmax is the prediction.
        logits_before: ``[B,C]`` of view 0 under the initial prompt.
        loss: ``[B]`` at the initial prompt (see each method).
        selected: ``[B,V]`` bool, the views that the method used.
        ctx: ``[B,M,d]`` tuned contexts, or None if none was tuned.
    """

    logits: Tensor
    logits_before: Tensor
    loss: Tensor
    selected: Tensor
    ctx: Tensor | None = None


@dataclass(frozen=True)
class Setting:
    """Where a method runs: what a run knows beside features, prompts and options."""

    clip: Clip
    prompts: Prompts | TemplatePrompts
    dataset: typing.Any  # ids, classnames, and images by position
    augmenter: typing.Any  # made the views; ``groups`` says how they lie
    config: typing.Any  # of the run, filled in
    cache: Path
    seed: int
    device: str


@dataclass
class Prepared:
    """A method made ready for one run: ``adapt(features [B,V,D], prompts, ids) -> Adapted``.

    ``seconds`` is what views of its own took: keys "encode" and "generate", for all images.
    """

    adapt: Callable[[Tensor, Prompts, Sequence[str]], Adapted]
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A method, as command line, sweep, planner and leaderboard read it.

    Attributes:
        adapt: ``adapt(features [B,V,D], prompts, options) -> Adapted``; view 0 is the image itself.
        options: frozen dataclass of its options, whose fields :func:`option` makes.
        views: "all", or "first" if it looks at the image only.
        tunes: nothing, the context, the text features, or the encoder.
        kind: episodic; online (all images in one call, in an order); transductive.
        needs: in words, what it needs beside features; such a method has ``prepare``.
        prepare: ``prepare(options, setting) -> Prepared``, once per run and before the encoding.
        resolve: ``resolve(options, config) -> options`` with every default filled in; raises
            ``ValueError`` for what cannot work together.
        identity: ``identity(options, config) -> dict``: what more the records depend on.
        aliases: older names -> the values of its options that they stood for.
        paper: published, under this name and year.
    """

    adapt: Callable[..., Adapted]
    options: type
    views: str = "all"
    tunes: str = "nothing"
    kind: str = "episodic"
    needs: str = ""
    prepare: Callable[..., Prepared] | None = None
    resolve: Callable[..., typing.Any] | None = None
    identity: Callable[..., dict] | None = None
    aliases: Mapping[str, Mapping] = field(default_factory=dict)
    paper: str = ""

    def __post_init__(self) -> None:
        for name, known in (("views", ("all", "first")), ("tunes", TUNES), ("kind", KINDS)):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), known))

    def __call__(
        self,
        features: Tensor,
        prompts: Prompts | TemplatePrompts,
        options=None,
        inputs: Mapping | None = None,
        **values,
    ) -> Adapted:
        """Adapt B images with options of their own: ``get("tpt")(features, prompts, rho=0.1)``.

        ``inputs`` is what a method needs beside features, as keywords of its ``adapt``.
        """
        if options is None:
            options = read_options(self, values)
        elif values:
            options = dataclasses.replace(options, **values)
        return self.adapt(features, prompts, options, **(inputs or {}))

    def ready(self, options, setting: Setting) -> Prepared:
        """:class:`Prepared`, also for a method that needs nothing but features."""
        if self.prepare:
            return self.prepare(options, setting)
        return Prepared(lambda features, prompts, ids: self.adapt(features, prompts, options))


# --- options -------------------------------------------------------------------------------------


def option(
    default,
    text: str,
    flat: str = "",
    shared: bool = False,
    holds: Callable[[typing.Any], bool] | None = None,
    allowed: str = "",
    choices: Sequence[str] | Callable[[], Sequence[str]] | None = None,
    aliases: Mapping[str, str] | None = None,
):
    """A field of an options dataclass.

    Args:
        flat: its name in the study and on the command line, if that is another.
        shared: an option of the study, given to all methods; those that lack it leave it out.
        holds, allowed: range check, and what it allows, in words.
        choices: known names, or a function that lists them.
        aliases: older spellings of values.
    """
    about = {"help": text, "flat": flat, "shared": shared, "holds": holds, "allowed": allowed}
    about |= {"choices": choices, "aliases": aliases or {}}
    return dataclasses.field(default=default, metadata=about)


def fraction(default: float, text: str, **more):
    """An option in (0, 1]."""
    allowed = more.pop("allowed", "a fraction in (0, 1]")
    return option(default, text, holds=lambda x: 0 < x <= 1, allowed=allowed, **more)


def positive(default: float | None, text: str, **more):
    """An option above 0."""
    return option(
        default, text, holds=lambda x: 0 < x < math.inf, allowed="a positive number", **more
    )


def not_negative(default: float, text: str, **more):
    """An option from 0 on."""
    return option(default, text, holds=lambda x: 0 <= x < math.inf, allowed="0 or more", **more)


def share(default: float, text: str, **more):
    """An option in [0, 1]."""
    return option(default, text, holds=lambda x: 0 <= x <= 1, allowed="a number in [0, 1]", **more)


def at_least(low: int, default: int | None, text: str, **more):
    """A whole number from ``low`` on."""
    return option(default, text, holds=lambda x: x >= low, allowed=f"{low} or more", **more)


def rho(default: float = 0.1):
    """The selection ratio, which most methods have."""
    text = f"selection ratio: fraction of the views kept, in (0, 1] ({default})"
    more = {"flat": "selection_p_all", "shared": True}
    return fraction(default, text, allowed="a fraction in (0, 1], as rho of TPT", **more)


@functools.cache
def _hints(options: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(options)


def flat_name(field_: dataclasses.Field) -> str:
    """The name of an option outside of its method."""
    return field_.metadata["flat"] or field_.name


def check_type(name: str, value: object, hint: object) -> None:
    """Raise ``ValueError`` if a value is not what a field's type says."""
    kinds = typing.get_args(hint) or (hint,)
    if callable(value) and Callable in (typing.get_origin(k) or k for k in kinds):
        return
    kinds = tuple(k for k in kinds if isinstance(k, type))
    if float in kinds:
        kinds = (*kinds, int)
    # bool is an int in Python, but n_aug=True is a mistake
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__.replace("NoneType", "None") for k in kinds)
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}); it must be {wanted}.")


def check_value(name: str, value: object, about: Mapping) -> None:
    """Raise ``ValueError`` for a name that is not among the choices, or a value out of range."""
    known = about["choices"]() if callable(about["choices"]) else about["choices"]
    if known is not None and isinstance(value, str) and value not in known:
        raise ValueError(unknown(name, value, [k or "''" for k in known]))
    if about["holds"] and value is not None and not about["holds"](value):
        raise ValueError(f"{name} is {value}; it must be {about['allowed']}.")


def read_options(method: Method, values: Mapping, outside: bool = False):
    """The options of a method from a dict, checked.

    Args:
        values: by their own names, or (``outside``) by their flat ones, which messages then use.
    Raises:
        ValueError: unknown names with the closest known one, wrong types, values out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(method.options)}
    known = {flat_name(f): f.name for f in fields.values()} if outside else {}
    known = {name: name for name in fields} | known
    out = {}
    for name, value in values.items():
        if name not in known:
            shown = [flat_name(f) for f in fields.values()] if outside else list(fields)
            raise ValueError(
                unknown("option", name, shown) if shown else f"{name}: there are no options here."
            )
        about = fields[known[name]].metadata
        value = about["aliases"].get(value, value) if isinstance(value, str) else value
        hint = _hints(method.options)[known[name]]
        check_type(name, value, hint)
        check_value(name, value, about)
        if isinstance(value, int) and float in (typing.get_args(hint) or (hint,)):
            value = float(value)  # 1 and 1.0 are the same run
        out[known[name]] = value
    return method.options(**out)


# --- what the methods' files share ---------------------------------------------------------------


def initial_logits(features: Tensor, prompts: Prompts | TemplatePrompts) -> Tensor:
    """``[B,V,D] -> [B,V,C]`` under the initial prompt, on the model's device."""
    check_features(features, prompts)
    x = features.to(weight_of(prompts))
    with torch.no_grad():
        return prompts.clip.logit_scale.to(x) * x @ prompts.text_features().T


def weight_of(prompts: Prompts | TemplatePrompts) -> Tensor:
    """A tensor of the dtype and on the device in which the text tower computes."""
    return text_tower(prompts.clip.model).token_embedding.weight


def as_mask(chosen: Tensor, features: Tensor) -> Tensor:
    """Indices ``[B,k]`` -> bool ``[B,V]``."""
    mask = torch.zeros(features.shape[:2], dtype=torch.bool, device=chosen.device)
    return mask.scatter(1, chosen, True)


def only_the_image(features: Tensor) -> Tensor:
    """The mask ``[B,V]`` of a method that looks at view 0 alone."""
    mask = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    mask[:, 0] = True
    return mask


def back(features: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on the device of the features."""
    return tuple(t.to(features.device) for t in tensors)


def take(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows of views: ``[B,V,C]``, ``[B,k]`` -> ``[B,k,C]``."""
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))


def check_features(features: Tensor, prompts: Prompts | TemplatePrompts) -> None:
    """Raise ``ValueError`` for features that are not ``[B,V,D]`` of the prompts' model."""
    d = prompts.clip.embed_dim
    if features.ndim != 3 or features.shape[-1] != d or 0 in features.shape:
        raise ValueError(
            f"features have shape {list(features.shape)}; expected [B,V,{d}] with B, V > 0: the "
            f"views of each image, encoded with the same model ({prompts.clip.name})."
        )
