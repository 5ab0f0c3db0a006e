"""CoOp's checkpoints: reading and writing a context."""

import io
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from tpt_nb.core.files import write_whole
from tpt_nb.core.messages import first_line

# the models for which CoOp's authors published contexts, as their zip file spells them
BACKBONES = {"RN50": "rn50", "RN101": "rn101", "ViT-B/16": "vit_b16", "ViT-B/32": "vit_b32"}
OWN = ("ctx", "token_prefix", "token_suffix")  # of CoOp's prompt learner; others train more


class _Inert:
    """Stands for any class that a checkpoint names and we do not need; does nothing."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


def _plain_dict(*args) -> dict:
    """Stands for ``defaultdict``, which holds an optimiser's state and must take entries."""
    return {}


def load_coop(path: str | Path, M: int, d: int, n_classes: int | None = None) -> Tensor:
    """The context of a CoOp checkpoint, float32 on the CPU.

    Only ``state_dict["ctx"]`` is used; the token buffers belong to the classes of the training.
    Nothing in the file is executed: the checkpoints of CoOp's trainer also hold optimiser and
    scheduler objects, and every class but tensors is replaced by one that does nothing.

    Args:
        M, d: the number and width of context vectors that the prompts need.
        n_classes: C for a class-specific context ``[C,M,d]``, None for a shared one ``[M,d]``.
    Raises:
        FileNotFoundError, ValueError: no file, another layout, other M, width or C, values that
            are not finite, a context of another method (CoCoOp's, without its meta-net).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no CoOp checkpoint at {path}.")
    try:
        # a file in the format of torch before 1.6 may hold tensors and plain values only
        new = zipfile.is_zipfile(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if new else []
        stand_ins = {"collections.defaultdict": _plain_dict}
        allowed = [(stand_ins.get(name, _Inert), name) for name in names]
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever they spell
        if isinstance(error, pickle.UnpicklingError) and "operand" not in str(error):
            raise ValueError(
                f"{path} holds objects that cannot be read without running code from the file. If "
                "you trust it, load it yourself and write the context alone with models.save_coop."
            ) from error
        why = first_line(error) or type(error).__name__
        raise ValueError(f"{path} is no readable torch checkpoint: {why}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    ctx = state.get("ctx") if isinstance(state, dict) else None
    if not isinstance(ctx, Tensor):
        keys = list(checkpoint)[:6] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} is not laid out as CoOp's checkpoints are: expected state_dict['ctx'], "
            f"found {keys}."
        )
    more = [str(key) for key in state if key not in OWN]
    if more:
        whose = "of CoCoOp, whose" if any(k.startswith("meta_net") for k in more) else "whose"
        raise ValueError(
            f"{path} is a checkpoint {whose} context means nothing without what was trained with "
            f"it ({', '.join(more[:3])}); expected one of CoOp, with a context alone."
        )
    expected = (M, d) if n_classes is None else (n_classes, M, d)
    if tuple(ctx.shape) != expected:
        raise ValueError(f"{path} {_coop_mismatch(tuple(ctx.shape), expected)}")
    plain = ctx.layout == torch.strided and not ctx.is_meta and ctx.is_floating_point()
    if not plain or not (ctx := ctx.detach().float()).isfinite().all():
        raise ValueError(f"{path} holds a context with values that are not finite numbers.")
    return ctx


def find_coop(folder: str | Path, model: str, M: int = 4) -> Path | None:
    """The checkpoint for a model among those that CoOp's authors published, or None.

    Their zip file has ``rn50_ep50_16shots/nctx4_cscFalse_ctpend/seed1/.../model.pth.tar-50`` and so
    on, in ``to_gdrive``; of several seeds the first is taken.
    """
    if model not in BACKBONES:
        return None
    for path in sorted(Path(folder).rglob("*model.pth.tar*")):
        parts = path.relative_to(folder).as_posix().lower().split("/")
        of_model = any(part.startswith(f"{BACKBONES[model]}_") for part in parts)
        if of_model and any(f"nctx{M}_" in part for part in parts):
            return path
    return None


def _coop_mismatch(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Why a context of ``shape`` does not fit, and what to do."""
    text = f"holds a context of shape {list(shape)}, expected {list(expected)}: "
    if 0 in shape or len(shape) not in (2, 3):
        return text + "it holds no context vectors."
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
    content = io.BytesIO()
    torch.save({"state_dict": {"ctx": ctx.detach().cpu().half()}, "epoch": epoch}, content)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
