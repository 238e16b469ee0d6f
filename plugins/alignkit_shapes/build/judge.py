"""The VQA model: a BlipForQuestionAnswering that is trained to answer yes or no about drawings.

Trained end to end from scratch it only ever gives the majority answer, so it is trained in stages: first the vision
tower learns which things are present (with a temporary linear head over max-pooled tokens), then the text encoder and
decoder are trained on the frozen features, and then everything is trained together. Every batch has new scenes. Once
there is a teacher, the model is also trained on the teacher's unfinished images, with the pixel check's answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import Parameter
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

from alignkit import PolicySettings
from alignkit.config.bundles import find_policy
from alignkit.data.decode import to_uint8
from alignkit.diffusion import add_noise
from alignkit_rewards.attribute_binding import answer_logits, encode, yes_no
from alignkit_shapes.build.questions import corrupted, labels, pixels, question
from alignkit_shapes.pixel_check import Region, answers, find_regions
from alignkit_shapes.scenes import COLORS, SHAPES, Scene, caption, draw, sample_scene

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "yes", "no", "is", "are", "there", "the"]
WORDS += ["a", "an", "?", "and", "of", "left", "right", "above", "below", ",", "made", "small", "large"]
NAMES = [*list(SHAPES)[:3], "star", *list(SHAPES)[3:]]
"""With "star", which the shipped weights were first trained with."""
IMAGE = 64
WIDTH = 96
Sketch = tuple[np.ndarray, Scene, list[Region]]
"""An image, uint8 (SIZE, SIZE, 3), the scene it should show, and the regions that the pixel check finds in it."""
Lesson = tuple[torch.Tensor, list[list[tuple[str, bool]]]]
"""The image tokens (N, T, WIDTH) of N images, and for each image the same number of questions with true answers."""


def tokenizer() -> BertTokenizer:
    """Return a tokenizer of whole words, of the same class as that of the public BLIP VQA model."""
    words = [*WORDS, *NAMES, *COLORS]
    return BertTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        additional_special_tokens=["[DEC]", "[ENC]"],
        model_max_length=35,
    )


def config(vocabulary: int, dec: int) -> BlipConfig:
    """Return a much smaller configuration of the same class as the public BLIP VQA model."""
    return BlipConfig(
        text_config=dict(
            vocab_size=vocabulary, hidden_size=WIDTH, encoder_hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40, projection_dim=WIDTH,
            bos_token_id=dec, pad_token_id=0, sep_token_id=3, eos_token_id=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        vision_config=dict(
            hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=4, num_attention_heads=4,
            image_size=IMAGE, patch_size=8, hidden_act="gelu", layer_norm_eps=1e-6,
            initializer_range=0.02,  # with the class default of 1e-10 the tower does not train
        ),
        projection_dim=WIDTH, image_text_hidden_size=WIDTH,
    )  # fmt: skip


def _optimizer(parameters: list[Parameter], lr: float, steps: int) -> tuple[AdamW, OneCycleLR]:
    optimizer = AdamW(parameters, lr=lr, weight_decay=0.01)
    return optimizer, OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)


def train_vision(model: BlipForQuestionAnswering, steps: int, batch: int, rng: np.random.Generator) -> None:
    """Stage 1: predict presence labels from the maximum over the image tokens."""
    head = torch.nn.Linear(WIDTH, len(labels(sample_scene(rng))))
    parameters = [*model.vision_model.parameters(), *head.parameters()]
    optimizer, schedule = _optimizer(parameters, 1e-3, steps)
    start = time.time()
    for step in range(steps):
        scenes = [sample_scene(rng) for _ in range(batch)]
        target = torch.from_numpy(np.stack([labels(s) for s in scenes]))
        tokens = model.vision_model(pixel_values=pixels([draw(s) for s in scenes], rng)).last_hidden_state
        logits = head(tokens.amax(1))
        loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(6.0))
        _step(loss, parameters, optimizer, schedule)
        if step % 100 == 0 or step == steps - 1:
            found = logits > 0
            recall = (found & (target > 0)).sum() / target.sum()
            precision = (found & (target > 0)).sum() / found.sum().clamp(min=1)
            print(
                f"vision {step} loss {loss.item():.4f} recall {recall:.3f} precision {precision:.3f} "
                f"{time.time() - start:.0f} s",
                flush=True,
            )


def _step(loss: torch.Tensor, parameters: list[Parameter], optimizer: AdamW, schedule: OneCycleLR) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


class Features:
    """A pool of scenes with the frozen vision tower's tokens; each batch replaces some of them."""

    def __init__(self, model: BlipForQuestionAnswering, size: int, rng: np.random.Generator) -> None:
        self.model, self.rng = model, rng
        self.scenes: list[Scene] = []
        self.tokens = torch.zeros(size, (IMAGE // 8) ** 2 + 1, WIDTH)
        for start in range(0, size, 64):
            self._fill(list(range(start, min(start + 64, size))))

    @torch.no_grad()
    def _fill(self, places: list[int]) -> None:
        scenes = [sample_scene(self.rng) for _ in places]
        tokens = self.model.vision_model(pixel_values=pixels([draw(s) for s in scenes], self.rng)).last_hidden_state
        for place, scene, features in zip(places, scenes, tokens, strict=True):
            self.scenes[place : place + 1] = [scene]
            self.tokens[place] = features

    def batch(self, size: int, fresh: int) -> tuple[list[Scene], torch.Tensor]:
        """Replace `fresh` random scenes, then return `size` random scenes with their tokens."""
        self._fill(self.rng.integers(0, len(self.scenes), fresh).tolist())
        index = self.rng.integers(0, len(self.scenes), size)
        return [self.scenes[i] for i in index], self.tokens[index]


def _train_answers(
    name: str,
    model: BlipForQuestionAnswering,
    words: BertTokenizer,
    parameters: list[Parameter],
    steps: int,
    lr: float,
    accuracy: float,
    lesson: Callable[[int], Lesson],
) -> None:
    """Train on the questions of each step's `lesson`; `accuracy` is the initial value of the printed running mean."""
    optimizer, schedule = _optimizer(parameters, lr, steps)
    start = time.time()
    choice = yes_no(words)
    for step in range(steps):
        features, questions = lesson(step)
        rows = torch.arange(len(questions)).repeat_interleave(len(questions[0]))
        ids = encode(model, words, [text for some in questions for text, _ in some])
        logits = answer_logits(model, choice, features, rows, ids)
        target = torch.tensor([0 if truth else 1 for some in questions for _, truth in some])
        loss = F.cross_entropy(logits, target)
        _step(loss, parameters, optimizer, schedule)
        accuracy = 0.98 * accuracy + 0.02 * (logits.argmax(1) == target).float().mean().item()
        if step % 100 == 0 or step == steps - 1:
            elapsed = time.time() - start
            print(f"{name} {step} loss {loss.item():.4f} accuracy {accuracy:.4f} {elapsed:.0f} s", flush=True)


def train_text(
    model: BlipForQuestionAnswering,
    words: BertTokenizer,
    steps: int,
    batch: int,
    rng: np.random.Generator,
    lr: float = 6e-4,
) -> None:
    """Stage 2: train text encoder and decoder on frozen features, with two questions per scene.

    The first fifth of the steps has only questions about presence; colours are then learned quickly. With all questions
    from the start the accuracy stays near 50 % for long.
    """
    pool = Features(model, 3000, rng)

    def lesson(step: int) -> Lesson:
        scenes, features = pool.batch(batch, fresh=6)
        return features, [[question(s, rng, colors=step >= steps // 5) for _ in range(2)] for s in scenes]

    parameters = [*model.text_encoder.parameters(), *model.text_decoder.parameters()]
    _train_answers("text", model, words, parameters, steps, lr, 0.5, lesson)


def train_together(
    model: BlipForQuestionAnswering,
    words: BertTokenizer,
    steps: int,
    batch: int,
    rng: np.random.Generator,
    lr: float = 2e-4,
) -> None:
    """Stage 3: train the whole model, with four questions per new scene; half of the drawings are corrupted."""

    def lesson(step: int) -> Lesson:
        scenes = [sample_scene(rng) for _ in range(batch)]
        drawings = [corrupted(s, rng) if rng.random() < 0.5 else (draw(s), s, []) for s in scenes]
        features = model.vision_model(pixel_values=pixels([p for p, _, _ in drawings], rng)).last_hidden_state
        return features, [[question(truth, rng, gone=gone) for _ in range(4)] for _, truth, gone in drawings]

    _train_answers("judge", model, words, list(model.parameters()), steps, lr, 0.95, lesson)


@torch.no_grad()
def sketches(teacher: Path, count: int, rng: np.random.Generator, guidance_scale: float = 3.0) -> list[Sketch]:
    """Denoise noised drawings with the teacher in one or two steps, and find the regions of the results.

    Like the images of few-step models, they range from correct to melted.
    """
    settings = PolicySettings(trainable=False, guidance_scale=guidance_scale)
    policy = find_policy(str(teacher)).load(str(teacher), settings)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    found: list[Sketch] = []
    while len(found) < count:
        scenes = [sample_scene(rng) for _ in range(64)]
        prompt = policy.encode([caption(scene, rng) for scene in scenes])
        x = policy.encode_images(torch.from_numpy(np.stack([draw(s) for s in scenes])).permute(0, 3, 1, 2) / 255)
        # One step from high noise; for half of the images a second step from lower noise, which sharpens the first.
        for low, high, share in ((300, 950, 1.0), (150, 600, 0.5)):
            t = torch.randint(low, high, (len(x),), generator=generator)
            noise = torch.randn(x.shape, generator=generator)
            again = policy.denoise(add_noise(x, noise, *policy.schedule(t)), t, prompt)
            keep = torch.rand(len(x), generator=generator) < share
            x = torch.where(keep[:, None, None, None], again, x)
        images = to_uint8(policy.decode(x)).permute(0, 2, 3, 1).numpy()
        found += [(image, scene, find_regions(image)) for image, scene in zip(images, scenes, strict=True)]
    return found


def sketch_question(sketch: Sketch, rng: np.random.Generator) -> tuple[str, bool]:
    """Return a question about a thing of the scene, or sometimes another, with the pixel check's answer."""
    _, scene, regions = sketch
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if rng.random() < 0.2:
        thing = replace(thing, shape=str(rng.choice(list(SHAPES))))
    if rng.random() < 0.25:
        thing = replace(thing, color=str(rng.choice(list(COLORS))))
    present, colored = answers(regions, [thing])
    if rng.random() < 0.5:
        return f"is there {'an' if thing.shape[0] in 'aeiou' else 'a'} {thing.shape}?", present
    return f"is the {thing.shape} {thing.color}?", colored


def train_on_sketches(
    model: BlipForQuestionAnswering,
    words: BertTokenizer,
    teacher: Path,
    steps: int,
    batch: int,
    rng: np.random.Generator,
    lr: float = 2e-4,
    pool: int = 8000,
) -> None:
    """Stage 4: train the whole model on drawings and the teacher's sketches, half of each, four questions per image."""
    known = sketches(teacher, pool, rng)

    def lesson(step: int) -> Lesson:
        some = [known[i] for i in rng.integers(0, len(known), batch // 2)]
        scenes = [sample_scene(rng) for _ in range(batch - len(some))]
        drawings = [corrupted(s, rng) if rng.random() < 0.5 else (draw(s), s, []) for s in scenes]
        images = [p for p, _, _ in drawings]
        # The labels of sketches come from their exact pixels, so sketches get no blur or noise.
        inputs = torch.cat([pixels(images, rng), pixels([p for p, _, _ in some], rng, rough=0.0)])
        features = model.vision_model(pixel_values=inputs).last_hidden_state
        questions = [[question(truth, rng, gone=gone) for _ in range(4)] for _, truth, gone in drawings]
        return features, questions + [[sketch_question(sketch, rng) for _ in range(4)] for sketch in some]

    _train_answers("sketches", model, words, list(model.parameters()), steps, lr, 0.85, lesson)


def train(
    out: Path,
    vision_steps: int = 5000,
    text_steps: int = 5000,
    together_steps: int = 1000,
    batch: int = 64,
    seed: int = 1,
) -> None:
    """Run stages 1 to 3 and save model and tokenizer to `out`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    words = tokenizer()
    model = BlipForQuestionAnswering(config(len(words), words.convert_tokens_to_ids("[DEC]")))
    model.train()
    train_vision(model, vision_steps, batch, rng)
    model.save_pretrained(out)
    train_text(model, words, text_steps, batch, rng)
    train_together(model, words, together_steps, batch // 2, rng)
    model.eval().save_pretrained(out)
    words.save_pretrained(out)


def refine(first: Path, teacher: Path, out: Path, steps: int = 1000, batch: int = 48, seed: int = 7) -> None:
    """Run stage 4 on the model in `first` and save model and tokenizer to `out`."""
    torch.manual_seed(seed)
    words = BertTokenizer.from_pretrained(first)
    model = BlipForQuestionAnswering.from_pretrained(first).float().train()
    train_on_sketches(model, words, teacher, steps, batch, np.random.default_rng(seed))
    model.eval().save_pretrained(out)
    words.save_pretrained(out)
