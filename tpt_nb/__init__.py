"""Helpers behind the notebooks on test-time adaptation (TTA) of CLIP.

Two stages, because the image encoder is frozen in nearly every method::

    image --augmenter--> views [V,3,H,W] --image encoder--> features [V,D]    stage 1: features
    class names --prompts(ctx)--> text features [C,D]
    features, text features --> logits [V,C] --method--> prediction           stage 2: methods

Stage 1 is slow and cached on disk; stage 2 is fast and repeatable. The package is a house: a room
is a folder, and imports only from rooms above its own (all may use ``core``)::

    core      paths, whole-file writes, messages, images, downloads
    metrics   numbers from records        figures   one style for all charts
    models    CLIP, prompts, CoOp         views     augmenters         datasets   images and labels
    losses    logits [V,C] -> scalar      features  stage 1 and its cache
    methods   one file each, each describes itself; a table
    runs      configuration -> records and summary; sweep, leaderboard
    lessons   what notebooks need         scale     the same on many processes or machines
    course    student versions, grading

A notebook sees ``datasets, features, figures, losses, methods, metrics, models, runs, views`` and,
from ``lessons``, ``check, findings, setup, tables, widgets``. Every registry has two words,
``names()`` and ``get(name)``. Importing this package loads none of them, sets no seed and touches
no network.
"""

__version__ = "0.2.0"
