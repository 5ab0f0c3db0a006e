"""captions: what becomes of a caption, in the project's own procedure and with each repair."""

import copy
import itertools
import re
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from test_runs import CLASSES, PER_CLASS, world  # noqa: F401 (a fixture)

from tpt_nb import datasets, methods
from tpt_nb.core.paths import DATA
from tpt_nb.datasets import iconshift
from tpt_nb.methods import caption_prompts
from tpt_nb.methods.caption_prompts import ClipCaptioner, find_word, personal_prompts
from tpt_nb.methods.caption_prompts.captioners import PLAIN, SLOTS, sentence
from tpt_nb.methods.caption_prompts.texts import encode_alike
from tpt_nb.methods.caption_prompts.words import CHARACTERS, token_length, words_of
from tpt_nb.models import Prompts, clip
from tpt_nb.runs import RunConfig, run

NAMES = ["cat", "apple", "hot dog", "umbrella", "hourglass"]
SCENE = "a cat next to a car, in a cartoon of cattle"


@pytest.fixture(scope="module")
def captioner(mini) -> ClipCaptioner:
    return ClipCaptioner(mini, NAMES)


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("cat", "a cat"), ("apple", "an apple"), ("hourglass", "an hourglass"), ("hat", "a hat"),
     ("umbrella", "an umbrella"), ("unicycle", "a unicycle"), ("one", "a one"),
     ("ice cream", "an ice cream"), ("european bee", "a european bee"), ("Ant", "an Ant")],
)  # fmt: skip
def test_article(name, phrase):
    assert caption_prompts.with_article(name) == phrase


def test_the_projects_procedure_with_its_defects():
    prompts = personal_prompts(SCENE, find_word(SCENE, "cat"), ["dog"])
    assert prompts == ["a dog next to a car, in a cartoon of dogtle"]  # pieces of words too
    # KeyBERT hands out lower case, replace() looks for exactly that
    assert personal_prompts("A Cat sleeps", (2, 5), NAMES) == ["A Cat sleeps"] * len(NAMES)
    late = "a very long description of a scene in which at the very end there appears a cat"
    cut = personal_prompts(late, find_word(late, "cat"), ["elephant", "eagle"])
    assert all(len(p) == CHARACTERS for p in cut) and len(set(cut)) == 1
    assert personal_prompts(late, find_word(late, "cat"), ["elephant"], "limit")[0].endswith(
        "a elephant"
    )


@pytest.mark.parametrize("repairs", [r for r in caption_prompts.REPAIRS] + ["none", "all"])
def test_no_keyword_gives_the_standard_prompt(repairs):
    expected = [f"a photo of a {n}." for n in ("cat", "hot dog")]
    assert personal_prompts("a photo", None, ["cat", "hot_dog"], repairs) == expected
    assert personal_prompts("  ", (0, 1), ["cat", "hot_dog"], repairs) == expected


def test_span_touches_nothing_else():
    for word in ("cat", "car", "cartoon", "cattle"):
        start, end = find_word(SCENE, word)
        for name, prompt in zip(
            NAMES, personal_prompts(SCENE, (start, end), NAMES, "span"), strict=True
        ):
            assert prompt == SCENE[:start] + name + SCENE[end:]
    assert personal_prompts("A Cat sleeps", (2, 5), ["dog"], "span") == ["A dog sleeps"]


def test_article_follows_the_label_and_nothing_else():
    text = "an owl on a tree, an apple"
    got = personal_prompts(text, (3, 6), ["cat", "eagle"], "span+article")
    assert got == ["a cat on a tree, an apple", "an eagle on a tree, an apple"]
    assert personal_prompts("A dog", (2, 5), ["ant"], "span+article") == ["An ant"]
    assert personal_prompts("a big dog", (6, 9), ["ant"], "span+article") == ["a big ant"]


@pytest.mark.parametrize("repairs", ["limit", "span+limit", "all"])
@pytest.mark.parametrize("place", [0, 40, 79])
def test_limit_keeps_the_label_and_the_length(mini, repairs, place):
    words = [f"word{i}" for i in range(80)]
    words[place] = "cat"
    text = " ".join(words)
    prompts = personal_prompts(text, find_word(text, "cat"), NAMES, repairs)
    assert len(set(prompts)) == len(NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the tokenizer warns of a text that it cuts
        mini.tokenizer(prompts)
    for name, prompt in zip(NAMES, prompts, strict=True):
        assert re.search(rf"\b{name}\b", prompt)
        assert 60 < token_length(prompt) <= 77  # no more is dropped than must be


@pytest.mark.parametrize(
    ("caption", "word", "context"),
    [
        ("a bright cartoon of a large cat on the left", "cat", "a bright cartoon on the left"),
        ("a photo of a cat, striped background", "cat", "striped background"),
        ("cat sitting on top of a wooden table", "cat", "sitting on top of a wooden table"),
        ("a man riding a horse", "horse", "a man riding"),
        ("a red, cat", "cat", "a red"),  # the article is behind a comma: not of this noun
        ("the cat", "cat", ""),
        ("a cat.", "cat", ""),
    ],
)
def test_context_is_the_caption_without_its_subject(caption, word, context):
    span = find_word(caption, word)
    assert caption_prompts.context_of(caption, span) == context
    got = personal_prompts(caption, span, ["owl"], "suffix+article")
    assert got == [f"a photo of an owl, {context}." if context else "a photo of an owl."]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"unknown repairs 'spam'.*span\+limit"):
        personal_prompts("a cat", (2, 5), NAMES, "span+spam")
    with pytest.raises(ValueError, match=r"span \(2, 9\) lies outside the caption of 5"):
        personal_prompts("a cat", (2, 9), NAMES)
    assert caption_prompts.parse_repairs("suffix, span") == ("span", "suffix")
    assert caption_prompts.parse_repairs("all") == tuple(caption_prompts.REPAIRS)
    assert caption_prompts.parse_repairs("none") == caption_prompts.parse_repairs("") == ()


# --- captions and keywords -----------------------------------------------------------------------


def test_words():
    text = "A cat's tail, 2 owls_x"
    assert [text[a:b] for a, b in words_of(text)] == ["cat", "tail", "owls_x"]
    assert find_word("cattle and Cat", "cat") == (11, 14)
    assert find_word("cattle", "cat") is None


def test_caption_is_what_fits_best(mini, captioner):
    image = iconshift.scene("iconshift-r", 7)[0]
    view = torch.from_numpy(np.array(image.resize((64, 64), Image.BICUBIC)))
    feature = mini.encode_views(view.permute(2, 0, 1)[None])
    text = captioner.caption(image)
    assert captioner.captions(feature) == [text]
    thing = NAMES[
        int((feature @ mini.encode_text([f"a photo of a {n}." for n in NAMES]).T).argmax())
    ]
    for slot, words in SLOTS.items():
        options = [sentence(thing, **PLAIN | {slot: w}) + "." for w in words]
        best = words[int((mini.encode_text(options) @ feature[0]).argmax())]
        assert best in text and thing in text


def test_keyword_is_a_whole_word_or_nothing(captioner):
    for text in ("a cat on a mat", "An Owl, sitting.", "a photo of a birthday cake"):
        a, b = captioner.keyword(text)
        assert (a, b) in words_of(text)
    for text in ("", "a", "...", "? !"):
        assert captioner.keyword(text) is None


def test_keyword_is_keyberts(mini, captioner):
    keybert = pytest.importorskip("keybert")
    from keybert.backend import BaseEmbedder

    class Backend(BaseEmbedder):
        def embed(self, documents, verbose=False):
            return mini.encode_text(list(documents)).numpy()

    theirs = keybert.KeyBERT(model=Backend())
    model = caption_prompts.ViTGPT2(keybert=theirs)
    for text in (SCENE, "a dark cartoon of a tiny owl at the top", "two dogs in the snow"):
        found = theirs.extract_keywords(text, keyphrase_ngram_range=(1, 1), stop_words=None)
        a, b = captioner.keyword(text)
        assert text[a:b] == found[0][0]
        assert model.keyword(text) == (a, b)
    assert model.keyword("") is None


def test_vit_gpt2_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "keybert", None)
    model = caption_prompts.ViTGPT2()
    with pytest.raises(ValueError, match="needs transformers.*requirements-extras"):
        model.caption(Image.new("RGB", (32, 32)))
    with pytest.raises(ValueError, match="needs keybert"):
        model.keyword("a cat")


def test_vit_gpt2_captions_are_kept(tmp_path):
    """A ViT-GPT2 of two tiny layers with random weights, through the library's own classes."""
    t = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<end>", "a", "cat", "dog", "on", "mat", "tree"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    )
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye = t.ViTConfig(image_size=32, patch_size=16, intermediate_size=16, **small)
    mouth = t.GPT2Config(
        vocab_size=7, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    torch.manual_seed(0)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eye, mouth)
    config.decoder_start_token_id = config.pad_token_id = 0
    model = t.VisionEncoderDecoderModel(config).eval()
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")

    image = iconshift.scene("iconshift", 3)[0]
    asked = []
    cache = tmp_path / "captions.json"
    new = {"name": str(tmp_path / "model"), "cache": cache}
    writer = caption_prompts.ViTGPT2(fetch=lambda i: asked.append(i) or image, **new)
    texts = writer.captions(None, ["x", "y"])
    assert asked == ["x", "y"] and texts == [writer.caption(image)] * 2
    assert set(texts[0].split()) <= set(vocabulary) and len(texts[0].split()) <= 16
    again = caption_prompts.ViTGPT2(fetch=None, **new)
    assert again.captions(None, ["y", "x"]) == texts  # from the file: no image, no model


# --- features and the method ---------------------------------------------------------------------


def test_known_share_and_silence(mini):
    half = copy.copy(mini)
    half.model = copy.deepcopy(mini.model)
    (cat,) = mini.tokenizer(["cat"])[0][1:2].tolist()
    with torch.no_grad():
        half.model.token_embedding.weight[cat] = 0
    seen = torch.tensor([i for i in range(49408) if i != cat])
    half.tokenizer = clip.checked_tokenizer(SimpleTokenizer(), "half", seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert caption_prompts.known_share(half, ["cat dog", "dog dog"]) == 0.75
        assert caption_prompts.known_share(mini, ["cat dog"]) == 1.0
        assert caption_prompts.known_words(half, ["a cat on a dog.", "cat"]) == ["a on a dog.", ""]
        assert caption_prompts.known_words(mini, ["a  cat", ""]) == ["a cat", ""]
    half.tokenizer = clip.checked_tokenizer(SimpleTokenizer(), "half", seen)
    with pytest.warns(UserWarning, match="was not in the training captions"):
        half.tokenizer(["cat"])


def test_each_sentence_is_encoded_once(mini):
    lists = [["a cat", "a dog"], ["a dog", "a big red cat"], ["a cat", "a dog"]]
    memo = {}
    features, n = caption_prompts.encode_once(mini, lists, memo)
    assert n == 3 and features.shape == (3, 2, mini.embed_dim)
    for row, some in zip(features, lists, strict=True):
        assert torch.allclose(row, mini.encode_text(some), atol=1e-5)
    assert caption_prompts.encode_once(mini, lists, memo)[1] == 0


@pytest.mark.parametrize(
    "texts",
    [
        ["a cat", "a cat.", "a cat sat on the mat", "a dog"],
        ["cat", "dog"],  # nothing in common but the start token
        ["a photo of a cat", "a photo of a cat"],  # all in common
        ["", "a"],
        ["one"],
        [f"a dark photo of a {name} on the left" for name in iconshift.classnames()[:40]],
    ],
)
def test_common_beginnings_change_nothing(mini64, texts):
    got = encode_alike(mini64, texts)
    assert torch.allclose(got, mini64.encode_text(texts).float(), atol=1e-6)


def test_weight():
    generator = torch.Generator().manual_seed(0)
    standard = F.normalize(torch.randn(4, 8, generator=generator), dim=-1)
    image = F.normalize(standard[2:3] + 0.3 * torch.randn(1, 8, generator=generator), dim=-1)
    scale = torch.tensor(20.0)
    best = standard[(image @ standard.T).argmax()][None]
    assert caption_prompts.caption_weight(image, best, standard, scale).item() == pytest.approx(0.5)
    assert caption_prompts.caption_weight(image, image, standard, scale) > 0.5
    assert caption_prompts.caption_weight(image, -image, standard, scale) < 1e-6
    ends = caption_prompts.mix(standard, standard.flip(0)[None], torch.tensor([0.0]))
    assert torch.allclose(ends[0], standard, atol=1e-6)


@pytest.mark.parametrize("repairs", ["none", "span+suffix", "average", "all"])
def test_method_is_what_one_would_do_by_hand(mini, captioner, repairs):
    prompts = Prompts(mini, NAMES)
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(3, 2, mini.embed_dim, generator=generator), dim=-1)
    method = methods.get("caption_prompts")
    done = method(features, prompts, inputs={"captioner": captioner}, repairs=repairs)
    scale = float(mini.logit_scale)
    on = caption_prompts.parse_repairs(repairs)
    standard = mini.encode_text([f"a photo of a {n}." for n in NAMES])
    for i, x in enumerate(features[:, 0]):
        (text,) = captioner.captions(x[None])
        mine = personal_prompts(text, captioner.keyword(text), NAMES, on)
        rows = mini.encode_text(mine)
        if "average" in on:
            fit = [float(mini.encode_text([text])[0] @ x), float((standard @ x).max())]
            w = torch.tensor(fit).mul(scale).softmax(0)[0] if "weight" in on else 0.5
            rows = F.normalize((1 - w) * standard + w * rows, dim=-1)
        assert torch.allclose(done.logits[i], scale * rows @ x, atol=2e-3)
        assert torch.allclose(done.logits_before[i], scale * standard @ x, atol=2e-3)
    assert done.selected.tolist() == [[True, False]] * 3
    with pytest.raises(ValueError, match="needs a captioner"):
        method(features, prompts)


def test_a_run(world, tmp_path):  # noqa: F811
    done = {}
    for repairs in ("none", "all"):
        values = {"method": "caption_prompts", "captioner": "clip", "repairs": repairs}
        done[repairs] = run({**world, **values, "out": str(tmp_path)}, progress=False)
        assert len(done[repairs].records) == len(CLASSES) * PER_CLASS
        assert done[repairs].config.n_aug == 0  # one view is encoded, not eight
    assert done["all"].config.options["repairs"] == "+".join(caption_prompts.REPAIRS)
    assert done["none"].config.options == {"captioner": "clip", "repairs": "none"}
    a, b = (d.records for d in done.values())
    assert [r["pred_before"] for r in a] == [r["pred_before"] for r in b]
    assert [r["conf_after"] for r in a] != [r["conf_after"] for r in b]


def test_options_of_other_methods_are_refused(world):  # noqa: F811
    for option, value in (("repairs", "span"), ("captioner", "clip")):
        with pytest.raises(ValueError, match=f"{option}='{value}' is for method 'caption_prompts'"):
            run({**world, "method": "tpt", option: value})
    with pytest.raises(ValueError, match="unknown repairs"):
        run({**world, "method": "caption_prompts", "repairs": "spam"})
    with pytest.raises(ValueError, match="unknown captioner"):
        run({**world, "method": "caption_prompts", "captioner": "gpt"})
    with pytest.raises(ValueError, match="unknown repairs"):
        caption_prompts.Options(repairs="spam")


def test_defaults_are_filled_in():
    fill, options = caption_prompts.METHOD.resolve, caption_prompts.Options("suffix, span")
    assert fill(options, RunConfig(model="mini")) == caption_prompts.Options("span+suffix", "clip")
    assert fill(options, RunConfig(model="RN50")).captioner == "vit-gpt2"


def test_captioner_of_a_data_set(mini, tmp_path):
    data = datasets.load("iconshift", n=4)
    assert isinstance(caption_prompts.make_captioner("clip", mini, data), ClipCaptioner)
    writer = caption_prompts.make_captioner("vit-gpt2", mini, data, tmp_path)
    assert writer.cache.parent == tmp_path / "captions" and data.name in writer.cache.name
    assert writer.fetch(data.ids[2]).tobytes() == data[2][0].tobytes()
    with pytest.raises(ValueError, match="unknown captioner 'gpt'"):
        caption_prompts.make_captioner("gpt", mini, data)


def test_grammar_is_in_miniclips_words():
    """Every word of the caption grammar is one that MiniCLIP's captions use."""
    sys.path.insert(0, str(DATA / "miniclip"))
    try:
        import captions as training
    finally:
        sys.path.pop(0)
    known = set(re.findall(r"\w+", " ".join(training.vocabulary([]))))
    for words in itertools.product(*SLOTS.values()):
        text = sentence("", **dict(zip(SLOTS, words, strict=True)))
        assert set(re.findall(r"\w+", text)) <= known
