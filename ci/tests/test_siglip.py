"""SigLIP, tiny and random: sigmoid scores, other tokens, a text tower that is not causal."""

import json
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F

from tpt_nb import methods, models
from tpt_nb.losses import marginal_entropy
from tpt_nb.models import Prompts, TemplatePrompts
from tpt_nb.models.tokens import frame_of

NAMES = ["cat", "hot air balloon", "fire_engine", "dog"]
WORDS = ["a", "photo", "of", "the", "x", "cat", "hot", "air", "balloon", "fire", "engine", "dog"]
PADS = {"tiny-siglip": "</s>", "tiny-siglip2": "<pad>"}  # the two that exist


def save_tokenizer(folder, pad: str) -> None:
    """Words, as Hugging Face's tokenizers are kept: an end token behind a text, none before it."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    kept = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, eos_token="</s>", unk_token="<unk>"
    )
    kept.save_pretrained(folder)


@pytest.fixture(scope="module", params=PADS)
def world(request, tmp_path_factory):
    """The name of an architecture as open_clip has SigLIP's, in small; a file of its weights."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tokenizer(folder / "words", PADS[request.param])
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    config["embed_dim"] = 64
    config["vision_cfg"] |= {"timm_model_name": "test_vit", "image_size": 160}
    config["text_cfg"] |= {"context_length": 16, "vocab_size": 32, "width": 64, "heads": 2}
    config["text_cfg"] |= {"layers": 2, "hf_tokenizer_name": str(folder / "words")}
    (folder / f"{request.param}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm: no pretrained weights
        torch.manual_seed(0)
        model = open_clip.create_model(request.param).eval()
        with torch.no_grad():
            for p in model.text.parameters():
                p.add_(0.05 * torch.randn_like(p))
            model.logit_scale.fill_(4.7)
            model.logit_bias.fill_(-12.9)
    torch.save(model.state_dict(), folder / "weights.pt")
    return request.param, model, folder / "weights.pt"


@pytest.fixture(scope="module")
def clip(world):
    return models.load(f"{world[0]}@{world[2]}", device="cpu")


@pytest.fixture(scope="module")
def views():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 160, 160), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def features(clip, views):
    return clip.encode_views(views).view(2, 3, -1)


def test_a_file_gives_the_model_back(world, clip):
    name, theirs, path = world
    assert clip.fingerprint == models.weights_fingerprint(theirs) and clip.image_size == 160
    assert (clip.embed_dim, clip.ctx_dim) == (64, 64)
    assert float(clip.logit_scale) == pytest.approx(109.947, abs=1e-3)
    assert float(clip.logit_bias) == pytest.approx(-12.9)
    again = models.load(f"{name}@{path}", device="cpu")
    assert again.fingerprint == clip.fingerprint
    assert tuple(clip.tokenizer(["a cat"]).shape) == (1, 16)


def test_clip_has_no_bias(mini):
    assert float(mini.logit_bias) == 0


def test_statistics_of_the_images_are_those_of_the_published_weights():
    """A file does not say them; SigLIP's are not OpenAI's."""
    from tpt_nb.models.loading import _statistics

    known = open_clip.list_pretrained_tags_by_model("ViT-B-16-SigLIP")
    half = (0.5, 0.5, 0.5)
    found = _statistics("ViT-B-16-SigLIP", "some/file.pt", known)
    assert found == {"image_mean": half, "image_std": half}
    assert _statistics("ViT-B-16-SigLIP", "webli", known) == {}
    assert _statistics("tiny-siglip", "some/file.pt", []) == {}


def test_logits_are_open_clips_own(world, clip, views):
    name, theirs, _ = world
    tokens = open_clip.get_tokenizer(name)([f"a photo of a {n.replace('_', ' ')}." for n in NAMES])
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (clip.mean, clip.std))
    with torch.no_grad():
        expected = theirs.get_logits((views / 255 - mean) / std, tokens)[0]
    ours = clip.encode_views(views)
    for text in (
        Prompts(clip, NAMES).text_features(),
        Prompts(clip, NAMES).text_features(exact="paper"),
        TemplatePrompts(clip, NAMES, "single").text_features(),
    ):
        z = clip.logit_scale * ours @ text.T
        torch.testing.assert_close(z + clip.logit_bias, expected, rtol=1e-4, atol=1e-3)


def test_padding_is_seen_so_nothing_is_cut(clip):
    """Were the texts cut at their end token, the features would be others."""
    one, both = clip.encode_text(["a cat"]), clip.encode_text(["a cat", "a photo of the hot dog"])
    torch.testing.assert_close(one[0], both[0])
    tower, tokens = models.text_tower(clip.model), clip.tokenizer(["a cat"])
    x = tower.token_embedding(tokens)[:, :3] + tower.positional_embedding[:3]
    cut = F.normalize(models.run_text_tower(tower, x, torch.tensor([2])), dim=-1)
    assert (cut - one).abs().max() > 1e-3


def test_where_a_text_lies(world, clip, mini):
    assert frame_of(clip.tokenizer).start == () and frame_of(clip.tokenizer).end == 1
    assert frame_of(clip.tokenizer).pad == (1 if PADS[world[0]] == "</s>" else 0)
    frame = frame_of(mini.tokenizer)
    assert (frame.start, frame.end, frame.pad, frame.length) == ((49406,), 49407, 0, 77)
    heads = [[WORDS.index(w) + 3 for w in n.replace("_", " ").split()] for n in NAMES]
    assert [head for head, _ in Prompts(clip, NAMES).tokens] == heads


def test_methods_are_blind_to_the_bias(clip, features):
    """Softmax, votes and entropies of scores with and without it are the same."""
    prompts = Prompts(clip, NAMES)
    z = clip.logit_scale * features @ prompts.text_features().T
    zero = methods.get("zero_shot")(features, prompts)
    torch.testing.assert_close(zero.logits, z[:, 0])
    assert torch.equal(zero.logits.argmax(-1), (z[:, 0] + clip.logit_bias).sigmoid().argmax(-1))
    torch.testing.assert_close((z + clip.logit_bias).softmax(-1), z.softmax(-1))
    voted = methods.get("vote")(features, prompts, rho=1.0)
    counts = F.one_hot((z + clip.logit_bias).argmax(-1), len(NAMES)).sum(1)
    assert (counts.gather(1, voted.logits.argmax(-1, keepdim=True))[:, 0] == counts.amax(-1)).all()


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_a_step_of_tpt_is_that_of_plain_autograd(clip, features, position):
    """Open_clip's own forward of the embedded prompts, one image at a time, torch's AdamW."""
    prompts = Prompts(clip, NAMES, class_token_position=position)
    adapted = methods.get("tpt")(features, prompts, rho=0.7, lr=5e-3)
    tower, frame = models.text_tower(clip.model), frame_of(clip.tokenizer)
    half = {"end": 4, "middle": 2, "front": 0}[position]
    for b, views in enumerate(features):
        ctx = prompts.ctx.clone().requires_grad_(True)

        def text(ctx):
            rows = []
            for head, rest in prompts.tokens:
                tail = [*rest, frame.end]
                tail += [frame.pad] * (frame.length - 4 - len(head) - len(tail))
                name, end = (tower.token_embedding(torch.tensor(t)) for t in (head, tail))
                rows.append(torch.cat([ctx[:half], name, ctx[half:], end]))
            x = tower.transformer(torch.stack(rows) + tower.positional_embedding)
            return F.normalize(tower.text_projection(tower.ln_final(x)[:, -1]), dim=-1)

        loss = marginal_entropy(clip.logit_scale * views @ text(ctx).T, 0.7)
        optimizer = torch.optim.AdamW([ctx], lr=5e-3)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            expected = clip.logit_scale * views[0] @ text(ctx).T
        torch.testing.assert_close(adapted.loss[b], loss.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapted.logits[b], expected, rtol=1e-3, atol=1e-2)


EVERY = [n for n in methods.names() if not methods.get(n).needs]


@pytest.mark.parametrize("name", EVERY)
def test_every_method_that_needs_features_alone_runs(clip, features, name):
    prompts = Prompts(clip, NAMES)
    adapted = methods.get(name)(features, prompts)
    assert adapted.logits.shape == (2, len(NAMES)) and adapted.logits.isfinite().all()
    assert not prompts.has_jacobian


def test_too_long_for_its_own_context(clip):
    with pytest.raises(ValueError, match="tokens, the model takes 16"):
        Prompts(clip, ["cat dog " * 9])


def test_towers_of_other_kinds_are_still_refused():
    """Averages over unmasked tokens, and a class token of its own as CoCa's."""
    config = {"embed_dim": 8, "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32}}
    text = {"width": 64, "heads": 1, "layers": 1, "vocab_size": 10, "context_length": 5}
    for other in ({"no_causal_mask": True, "pool_type": "argmax"}, {"embed_cls": True}):
        model = open_clip.model.CustomTextCLIP(**config, text_cfg=text | other)
        with pytest.raises(ValueError, match="nor SigLIP's, which pools the last token"):
            models.text_tower(model)
