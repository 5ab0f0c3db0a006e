"""CoOp's checkpoints: reading and writing a context."""

import io
import pickle
from pathlib import Path

import torch
from torch import Tensor

from tpt_nb.core.files import write_whole


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
        FileNotFoundError, ValueError: no file, another layout, other M, width or C.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no CoOp checkpoint at {path}.")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = {"collections.defaultdict": _plain_dict}
        allowed = [(stand_ins.get(name, _Inert), name) for name in names]
        with torch.serialization.safe_globals(allowed):
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
    content = io.BytesIO()
    torch.save({"state_dict": {"ctx": ctx.detach().cpu().half()}, "epoch": epoch}, content)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
