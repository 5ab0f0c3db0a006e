"""What this machine is: versions, device, free memory."""

import os
import platform
from pathlib import Path


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
