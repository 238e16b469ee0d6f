from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForQuestionAnswering, CLIPConfig

from alignkit.errors import AlignkitError, ConfigError
from alignkit.records import Example
from alignkit_rewards.attribute_binding import AttributeBinding, answer_logits, encode, questions, yes_no
from alignkit_rewards.phrases import find_phrases
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize
from alignkit_shapes.build.judge import config, tokenizer

CPU = torch.device("cpu")
TEXTS = [
    "a red circle",
    "a small white heart, an orange square and a black triangle",
    "a red circle left of a blue square",
    "a large purple ring above a star",
    "an orange diamond and a small green cross",
    "two red stars",
]
EXAMPLES = [Example(text) for text in TEXTS]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded VQA model's configuration with random weights, spread widely enough that answers differ."""
    folder = tmp_path_factory.mktemp("judge")
    words = tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForQuestionAnswering(config(len(words), words.convert_tokens_to_ids("[DEC]")))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    coarse = torch.rand(len(TEXTS), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, size=96) * 255).round() / 255


def _loaded(judge: str, mode: str = "soft", per_pass: int = 256) -> AttributeBinding:
    reward = AttributeBinding(judge=judge, mode=mode, questions_per_pass=per_pass)  # type: ignore[arg-type]
    reward.load(CPU)
    return reward


def test_a_png_file_scores_as_the_image_in_memory(judge: str, images: torch.Tensor, tmp_path: Path) -> None:
    levels = (images[1] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(tmp_path / "image.png")
    again = torch.from_numpy(np.asarray(Image.open(tmp_path / "image.png")).copy()).permute(2, 0, 1)[None] / 255
    reward = _loaded(judge)
    torch.testing.assert_close(reward(again, EXAMPLES[1:2]).values, reward(images[1:2], EXAMPLES[1:2]).values)


def test_a_batch_scores_as_its_members_do_alone(judge: str, images: torch.Tensor) -> None:
    reward = _loaded(judge, per_pass=3)
    whole = reward(images, EXAMPLES)
    assert whole.values.std() > 1e-3
    for i in range(len(TEXTS)):
        alone = _loaded(judge)(images[i : i + 1], EXAMPLES[i : i + 1])
        torch.testing.assert_close(alone.values[0], whole.values[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.parts["exists"][0], whole.parts["exists"][i], atol=1e-5, rtol=0)


def test_scores_follow_a_permutation_of_the_batch(judge: str, images: torch.Tensor) -> None:
    reward = _loaded(judge)
    order = [3, 0, 5, 1, 4, 2]
    whole, mixed = reward(images, EXAMPLES), reward(images[order], [EXAMPLES[i] for i in order])
    torch.testing.assert_close(mixed.values, whole.values[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed.parts["attributes"], whole.parts["attributes"][order], atol=1e-5, rtol=0)


def test_every_mode_follows_from_the_same_logits(judge: str, images: torch.Tensor) -> None:
    model = _loaded(judge)
    size = model._model.config.vision_config.image_size
    features = model._model.vision_model(normalize(resize(images, size, size), CLIP_MEAN, CLIP_STD)).last_hidden_state
    scores = {mode: _loaded(judge, mode)(images, EXAMPLES) for mode in ("hard", "soft", "product")}
    hard_answers = set()
    for i, text in enumerate(TEXTS):
        all_questions = questions(find_phrases(text))
        rows = torch.full((len(all_questions),), i)
        ids = encode(model._model, model._tokenizer, [q for q, _ in all_questions])
        logits = answer_logits(model._model, yes_no(model._tokenizer), features, rows, ids)
        about = torch.tensor([a for _, a in all_questions])
        yes, p = (logits[:, 0] > logits[:, 1]).float(), logits.softmax(-1)[:, 0]
        hard_answers |= set(yes.tolist())
        torch.testing.assert_close(scores["hard"].values[i], yes.mean())
        torch.testing.assert_close(scores["soft"].values[i], p.mean())
        torch.testing.assert_close(scores["product"].values[i], p.prod())
        torch.testing.assert_close(scores["hard"].parts["exists"][i], yes[~about].mean())
        torch.testing.assert_close(scores["soft"].parts["attributes"][i], p[about].mean())
    assert hard_answers == {0.0, 1.0}


def test_by_phrase_the_product_equals_that_of_t2i_compbench(judge: str, images: torch.Tensor) -> None:
    """P("a red chair?") of each phrase by the whole model's softmax at its first step, multiplied."""
    reward = AttributeBinding(judge=judge, mode="product", questions="by_phrase")
    reward.load(CPU)
    phrases = {
        "a red circle": ["a red circle?"],
        "a small white heart, an orange square and a black triangle": [
            "a small white heart?", "an orange square?", "a black triangle?",
        ],
        "a red circle left of a blue square": ["a red circle?", "a blue square?"],
        "a large purple ring above a star": ["a large purple ring?", "a star?"],
        "an orange diamond and a small green cross": ["an orange diamond?", "a small green cross?"],
        "two red stars": ["red stars?"],
    }  # fmt: skip
    assert [reward.explain(example) for example in EXAMPLES] == [phrases[text] for text in TEXTS]
    model, words = reward._model, reward._tokenizer
    seen = model.vision_model(normalize(resize(images, 64, 64), CLIP_MEAN, CLIP_STD)).last_hidden_state
    expected = []
    for i, text in enumerate(TEXTS):
        product = 1.0
        for question in phrases[text]:
            ids = torch.tensor([words(question).input_ids])
            ids[:, 0] = words.convert_tokens_to_ids("[ENC]")
            read = model.text_encoder(input_ids=ids, encoder_hidden_states=seen[i : i + 1]).last_hidden_state
            begin = torch.tensor([[words.convert_tokens_to_ids("[DEC]")]])
            p = model.text_decoder(input_ids=begin, encoder_hidden_states=read).logits[0, 0].softmax(-1)
            yes, no = p[words.convert_tokens_to_ids(["yes", "no"])].tolist()
            product *= yes / (yes + no)
        expected.append(product)
    scores = reward(images, EXAMPLES)
    torch.testing.assert_close(scores.values, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert scores.valid.tolist() == [True, True, True, True, True, False]  # the model does not know the word "stars"
    assert scores.parts["exists"].isnan().tolist() == [True, True, True, False, True, True]


def test_half_precision_applies_to_the_towers_only(judge: str, images: torch.Tensor) -> None:
    half = AttributeBinding(judge=judge, mode="soft", precision="bf16")
    half.load(CPU)
    found, whole = half(images, EXAMPLES).values, _loaded(judge)(images, EXAMPLES).values
    assert half._model.text_encoder.dtype == torch.bfloat16 and found.dtype == torch.float32
    published = BlipForQuestionAnswering.from_pretrained(judge).text_decoder.cls.predictions.decoder
    half.load(CPU)  # loading again must not round once more
    last = half._model.text_decoder.cls.predictions.decoder
    assert torch.equal(last.weight, published.weight) and torch.equal(last.bias, published.bias)
    torch.testing.assert_close(found, whole, atol=0.05, rtol=0)
    assert not torch.equal(found, found.bfloat16().float())


def test_the_answer_is_the_token_that_generate_starts_with(judge: str, images: torch.Tensor) -> None:
    """The logits equal those of transformers' own `generate` if that is given the [ENC] token."""
    reward = _loaded(judge)
    model, words = reward._model, reward._tokenizer
    pixels = normalize(resize(images, 64, 64), CLIP_MEAN, CLIP_STD)
    text = "is the circle red?"
    ids = torch.tensor([words(text).input_ids] * len(TEXTS))
    ids[:, 0] = words.convert_tokens_to_ids("[ENC]")
    made = model.generate(
        ids, pixels, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    ).logits[0]
    features = model.vision_model(pixel_values=pixels).last_hidden_state
    rows = torch.arange(len(TEXTS))
    ours = answer_logits(model, yes_no(words), features, rows, encode(model, words, [text] * len(TEXTS)))
    torch.testing.assert_close(ours, made[:, words.convert_tokens_to_ids(["yes", "no"])], atol=1e-5, rtol=1e-4)


def test_soft_scores_have_a_gradient_to_the_pixels_and_the_model_stays_frozen(judge: str, images: torch.Tensor) -> None:
    reward = _loaded(judge)
    x = images.clone().requires_grad_()
    reward(x, EXAMPLES).values.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert reward.differentiable
    assert not any(p.requires_grad for p in reward._model.parameters())
    assert not reward._model.training


def test_hard_scores_have_no_gradient_and_report_it(judge: str, images: torch.Tensor) -> None:
    reward = _loaded(judge, "hard")
    assert not reward.differentiable
    assert not reward(images.clone().requires_grad_(), EXAMPLES).values.requires_grad


def test_what_cannot_be_scored_is_invalid_and_does_not_affect_the_rest(judge: str, images: torch.Tensor) -> None:
    reward = _loaded(judge)
    texts = ["a red circle", "in front of", "a circle", "a pink circle"]
    scores = reward(images[:4], [Example(t) for t in texts])
    assert scores.valid.tolist() == [True, False, False, False]
    unbound = "the prompt has no attribute to bind"
    unknown = "the VQA model does not know every word of 'is the circle pink?'"
    assert scores.reasons == ["", unbound, unbound, unknown]
    torch.testing.assert_close(scores.values[0], reward(images, EXAMPLES).values[0], atol=1e-5, rtol=0)
    nothing = reward(images[:1], [Example("in front of")])
    assert nothing.valid.tolist() == [False]
    # A truncated question would be another question.
    lengths = {count: [{"head": "circle", "attributes": [" ".join(["red"] * count)]}] for count in (10, 40)}
    long = reward(images[:2], [Example("many", {"phrases": phrases}) for phrases in lengths.values()])
    assert long.valid.tolist() == [True, False]
    assert long.reasons[0] == "" and long.reasons[1].endswith("tokens, the VQA model reads 35")


def test_a_prompt_without_attributes_is_refused_by_name_before_anything_loads() -> None:
    reward = AttributeBinding(judge="no/such/judge")
    reward.check(EXAMPLES)
    with pytest.raises(ConfigError, match="the prompt 'a circle and a square' has no attribute to bind") as caught:
        reward.check([*EXAMPLES, Example("a circle and a square")])
    assert "\n" not in str(caught.value)
    reward.check([Example("shapes", {"phrases": [{"head": "circle", "attributes": ["red"]}]})])


def test_loading_twice_keeps_the_model(judge: str) -> None:
    reward = _loaded(judge)
    model = reward._model
    reward.load(CPU)
    assert reward._model is model


def test_a_model_stored_in_half_precision_is_used_in_float32(judge: str, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(judge, folder)
    BlipForQuestionAnswering.from_pretrained(judge).half().save_pretrained(folder)
    assert {p.dtype for p in _loaded(str(folder))._model.parameters()} == {torch.float32}


def test_without_enc_in_the_tokenizer_the_id_after_dec_is_used(judge: str, images: torch.Tensor) -> None:
    """The public checkpoints are like this: their tokenizer is plain BERT's."""
    reward = _loaded(judge)
    before = reward(images, EXAMPLES).values

    class Plain:
        unk_token_id = reward._tokenizer.unk_token_id

        def __init__(self, inner: object) -> None:
            self.inner = inner

        def __call__(self, *args: object, **settings: object) -> object:
            return self.inner(*args, **settings)  # type: ignore[operator]

        def get_vocab(self) -> dict[str, int]:
            return {k: v for k, v in self.inner.get_vocab().items() if k != "[ENC]"}  # type: ignore[attr-defined]

    reward._tokenizer = Plain(reward._tokenizer)
    torch.testing.assert_close(reward(images, EXAMPLES).values, before)


def test_a_missing_folder_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(AlignkitError, match=r"attribute_binding: there is no folder .*gone") as caught:
        _loaded(str(tmp_path / "gone"))
    assert "\n" not in str(caught.value)


def test_another_kind_of_model_is_reported_in_one_line(tmp_path: Path) -> None:
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(AlignkitError, match="is a clip model; expected a hub id or a folder") as caught:
        _loaded(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_blip_of_another_head_is_refused_for_its_missing_weights(judge: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    shutil.copytree(judge, folder)
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("text_encoder.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AlignkitError, match=r"lacks text_encoder\..* and \d+ more"):
        _loaded(str(folder))


def test_a_truncated_weight_file_is_reported_in_one_line(judge: str, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(judge, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AlignkitError, match="cannot load the judge") as caught:
        _loaded(str(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_yes_is_refused(judge: str, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(judge, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["oui"] = content["model"]["vocab"].pop("yes")
    path.write_text(json.dumps(content))
    with pytest.raises(AlignkitError, match=r"turns yes and no into \[\[1\], \[8\]\], expected one token each"):
        _loaded(str(folder))


@pytest.mark.parametrize(("field", "value"), [("mode", "maybe"), ("questions", "all")])
def test_an_invalid_field_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f'^{field}: found "{value}", expected ".*" or ".*"$'):
        AttributeBinding(**{field: value})  # type: ignore[arg-type]


def test_a_field_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^questions_per_pass: found 0, expected 1 or more$"):
        AttributeBinding(questions_per_pass=0)


def test_the_fingerprint_distinguishes_models_and_modes_but_not_folders(judge: str, tmp_path: Path) -> None:
    hard = _loaded(judge, "hard")
    same = shutil.copytree(judge, tmp_path / "same")
    assert hard.deterministic and not hard.differentiable
    assert _loaded(str(same), "hard", per_pass=3).fingerprint() == hard.fingerprint() != _loaded(judge).fingerprint()
    other = BlipForQuestionAnswering.from_pretrained(judge)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    other.save_pretrained(same)
    assert _loaded(str(same), "hard").fingerprint() != hard.fingerprint()
