"""Helpers behind the notebooks on test-time adaptation (TTA) of CLIP.

Two stages, because the image encoder is frozen in every method::

    image --augmenter--> views [V,3,H,W] --image encoder--> features [V,D]    stage 1: encode
    class names --prompts(ctx)--> text features [C,D]
    features, text features --> logits [V,C] --method--> prediction           stage 2: adapt

Stage 1 is slow and cached on disk; stage 2 is fast and repeatable. Rooms: ``clip`` (models),
``prompts`` (learnable context), ``tower`` (the text tower, nothing computed twice), ``views``
(augmenters; ``resample`` cuts their crops on a GPU), ``losses``, ``adapt`` (methods), ``captions``
(prompts from captions), ``retrieval`` with ``database`` (RA-TTA), ``diffusion`` (generated views,
DiffTPT), ``datasets`` (with ``iconshift``, the embedded benchmark, ``folder`` and ``remote``, and
``benchmarks``, the field's sets, which ``sources`` and ``download`` bring), ``encode`` (stage 1 and
its cache), ``experiment`` (runs and records), ``metrics``, ``figures`` (from ``style``, ``charts``
and ``pictures``), ``widgets`` (sliders with a static figure), ``check`` (the checks in exercises),
``setup`` (the first cell of a notebook), ``course`` (student versions, grading), ``paths``.
Importing this package loads none of them, sets no seed and touches no network.
"""

__version__ = "0.1.0"
