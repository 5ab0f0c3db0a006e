"""Groups of images in threads: as many at once as the machine has cores for this run.

torch lets go of Python's lock within its kernels, and groups do not know of each other.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tpt_nb.methods import Method
from tpt_nb.models import Clip
from tpt_nb.runs.config import GROUP

LOGITS = 3  # [B,V,C] of an online or transductive method at once: logits, probabilities, products


def memory_of(method: Method, images: int, views: int, width: int, classes: int) -> float:
    """Bytes of features and logits that a call of a method takes, about.

    Of a group of images; of all of them for one that learns from image to image, or needs them
    together.
    """
    at_once = min(images, GROUP) if method.kind == "episodic" else images
    return 4.0 * at_once * views * (width + LOGITS * classes)


def threads_of(method: Method, clip: Clip) -> int:
    """Groups of images at once; 0 where a method changes the encoder or has things of its own."""
    apart = method.kind == "episodic" and method.tunes != "encoder" and not method.needs
    return torch.get_num_threads() if apart and clip.device.type == "cpu" else 0


def in_order(work: Callable, items: Sequence, threads: int) -> Iterator[tuple[int, Any]]:
    """``(how many are worked on at once, work(item))`` of each item, in their order.

    With ``threads`` every kernel has one of them, so that no bit depends on how many there are: a
    model as small as these gains more from two groups of images at once than from two threads in
    each product. The first item comes alone: it makes what the others find made. 0 threads: one
    item after the other, and kernels as they are.
    """
    if not threads:
        yield from ((1, work(item)) for item in items)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from ((1, work(item)) for item in items[:1])
        rest = items[1:]
        at_once = max(1, min(threads, len(rest)))
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            under_way: deque = deque()
            try:
                for item in rest:
                    under_way.append(pool.submit(work, item))
                    if len(under_way) > 2 * at_once:
                        yield at_once, under_way.popleft().result()
                while under_way:
                    yield at_once, under_way.popleft().result()
            finally:  # an error, or a cell that is stopped
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(before)
