"""A teacher from outside, and hard1 with locations."""

import pytest
import torch
from PIL import Image

from tpt_nb import datasets, losses, methods
from tpt_nb.methods import caption_prompts
from tpt_nb.models import Prompts

NAMES = ["cat", "hot_dog", "bus", "dog"]
GROUPS = (5, 2)  # the image, and 2 x 2 patches, two views each


def test_a_model_that_answers_in_words_is_a_teacher():
    picture, asked = Image.new("RGB", (4, 4)), []

    def ask(image, question):
        asked.append((image, question))
        return ["A hot dog.", "a cat and a bus", "no idea"][len(asked) - 1]

    teacher = caption_prompts.from_answers(ask, trust=0.8)
    said = caption_prompts.teach(teacher, [picture] * 3, NAMES)
    assert torch.allclose(said.sum(1), torch.ones(3))
    assert asked[0] == (picture, caption_prompts.teachers.QUESTION.format("cat, hot dog, bus, dog"))
    # "hot dog" holds the word dog too: both are named
    assert said[0].tolist() == pytest.approx([0.1, 0.4, 0.1, 0.4])
    assert said[1].tolist() == pytest.approx([0.4, 0.1, 0.4, 0.1])
    assert said[2].tolist() == [0.25] * 4
    with pytest.raises(ValueError, match="trust is 0"):
        caption_prompts.from_answers(ask, trust=0)


def test_a_caption_is_a_teacher(mini):
    teacher = caption_prompts.from_captions(lambda image: "a photo of a bus.", mini)
    p = teacher(None, NAMES)
    expected = (
        mini.encode_text(["a photo of a bus."])
        @ mini.encode_text([f"a photo of a {n.replace('_', ' ')}." for n in NAMES]).T
    )
    assert torch.allclose(p, (float(mini.logit_scale) * expected[0]).softmax(0), atol=1e-4)
    assert p.argmax() == 2
    image = datasets.load("iconshift-v2", n=1)[0][0]
    names = datasets.iconshift.classnames()
    captioner = caption_prompts.ClipCaptioner(mini, list(names))
    assert caption_prompts.teach(
        caption_prompts.from_captions(captioner.caption, mini), [image], list(names)
    ).shape == (1, 200)


@pytest.mark.parametrize("p", [[0.5, 0.5], [0.5, float("nan"), 0.2, 0.1], [-1, 1, 1, 1], [0] * 4])
def test_what_is_no_distribution_is_refused(p):
    with pytest.raises(ValueError, match="image 0: the teacher"):
        caption_prompts.teach(lambda image, names: torch.tensor(p), [None], NAMES)


# --- hard1 with locations ------------------------------------------------------------------------


def test_located_hard1_by_hand():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 4 * torch.randn(10, 6, generator=generator, dtype=torch.float64)
        loss = losses.get("located_hard1", groups=GROUPS)
        probs = logits.softmax(-1)
        groups = []
        for g in range(5):  # int(2 * 0.9) = 1 view of each, the more confident
            rows = probs[2 * g : 2 * g + 2]
            groups.append(min(rows, key=lambda p: float(-(p * p.log()).sum())))
        near = {0: [1, 2, 3, 4], 1: [0, 2, 3], 2: [0, 1, 4], 3: [0, 1, 4], 4: [0, 2, 3]}
        weights = [sum(groups[g] @ groups[h] for h in near[g]) / len(near[g]) + 1e-6 for g in near]
        mean = sum(w * p for w, p in zip(weights, groups, strict=True))
        expected = -logits[0].log_softmax(0)[mean.argmax()]
        assert float(loss(logits, 0.1)) == pytest.approx(float(expected), abs=1e-9)


def test_located_hard1_is_deaf_to_a_sure_patch_that_nothing_confirms():
    logits = torch.zeros(10, 3)
    logits[:, 1] = 2.0  # all lean to class 1
    logits[8:, 1], logits[8:, 2] = 0.0, 12.0  # one patch is sure of class 2
    place = losses.get("located_hard1", groups=GROUPS)
    by_entropy = losses.get("patch_loss2", groups=GROUPS)  # the surest patch wins there
    image = logits[0].log_softmax(0)
    assert float(place(logits, 0.1)) == pytest.approx(float(-image[1]))
    assert float(by_entropy(logits, 0.1)) == pytest.approx(float(-image[2]))


def test_tpt_runs_with_it(mini):
    prompts = Prompts(mini, NAMES)
    x = torch.nn.functional.normalize(torch.randn(3, 10, mini.embed_dim), dim=-1)
    loss = losses.get("located_hard1", groups=GROUPS)
    fast = methods.get("tpt")(x, prompts, loss=loss)
    paper = methods.get("tpt")(x, prompts, loss=loss, exact="paper")
    assert torch.allclose(fast.logits, paper.logits, atol=1e-2)
    assert torch.allclose(fast.loss, paper.loss, atol=1e-4)
