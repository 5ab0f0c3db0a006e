"""What this machine is: versions, device, free memory, a GPU that torch can use."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path


def has_gpu() -> bool:
    """Is there a CUDA GPU, and does this torch have kernels for it?"""
    return not gpu_problem()


def gpu_problem() -> str:
    """Why no GPU can be used, as the end of a sentence; empty if one can.

    ``torch.cuda.is_available`` is not enough: it is true for a card whose kernels this build of
    torch was made without (a P100 under CUDA 13), and the first operation on it fails.
    """
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU here"
    if torch.version.hip:
        return ""
    found, archs = torch.cuda.get_device_capability(0), torch.cuda.get_arch_list()
    if runs_on(found, archs):
        return ""
    return (
        f"the GPU here, {torch.cuda.get_device_name(0)} (sm_{found[0]}{found[1]}), is not one that "
        f"torch {torch.__version__} has kernels for ({', '.join(archs)})"
    )


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Do kernels of these architectures run on a GPU of this compute capability?

    A binary (sm_86) runs on its major version from its minor version on, PTX (compute_80) on all
    that is later. (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".)
    """
    for arch in archs:
        kind, _, number = arch.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        if len(digits) < 2:
            continue
        made_for = int(digits[:-1]), int(digits[-1])
        later = made_for <= capability and not number.endswith("a")  # sm_90a: for this one alone
        if made_for == capability or later and (kind == "compute" or made_for[0] == capability[0]):
            return True
    return False


def check_memory(size: float, what: str) -> None:
    """``ValueError`` if so many bytes are more than there is free memory; ``what`` is in it."""
    import torch

    free = free_memory(torch.device("cpu"))
    if size > free:
        raise ValueError(
            f"{what} need {size / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free. Take "
            "fewer images (reduced_size, n) or fewer views (n_aug), or a machine with more memory."
        )


def free_memory(device: "torch.device") -> int:  # noqa: F821
    """Bytes that can be had on a device; on the CPU within the limit of the container, if any."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # not Linux, or not limited
    if not found:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    return min(found)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    from importlib import metadata

    from tpt_nb import __version__

    out = {"python": platform.python_version(), "tpt_nb": __version__}
    for name in ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scipy"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "none"
    return out


def device_name(device: str) -> str:
    """What the run was computed on, in words."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
