"""The judge: a BlipForQuestionAnswering that learns to answer yes or no about drawings.

Trained end to end from scratch it stays at the majority answer, so it learns in stages: the vision tower first learns
what is present (a throw-away linear head over max-pooled tokens), then the text encoder and decoder learn to read the
frozen features, and then all of it learns together. Every batch shows fresh scenes. Once there is a teacher, the judge
also learns from the teacher's unfinished images, as the drawing program reads them.
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

from alignkit.config.bundles import find_policy
from alignkit.diffusion import add_noise
from alignkit.records import PolicySettings
from alignkit_rewards.attribute_binding import answers, encode, yes_no
from alignkit_shapes.build.questions import labels, pixels, question, spoiled
from alignkit_shapes.pixel_check import Region, read
from alignkit_shapes.pixel_check import answers as answers_of
from alignkit_shapes.scenes import COLORS, SHAPES, Scene, caption, draw, sample_scene

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "yes", "no", "is", "are", "there", "the"]
WORDS += ["a", "an", "?", "and", "of", "left", "right", "above", "below", ",", "made", "small", "large"]
NAMES = [*list(SHAPES)[:3], "star", *list(SHAPES)[3:]]
"""With "star", which the shipped weights knew in their first legs."""
IMAGE = 64
WIDTH = 96
Sketch = tuple[np.ndarray, Scene, list[Region]]
"""An image, uint8 (SIZE, SIZE, 3), the scene it is meant to show, and what is read in it."""
Lesson = tuple[torch.Tensor, list[list[tuple[str, bool]]]]
"""The image tokens (N, T, WIDTH) of N images, and equally many questions about each with their true answers."""


def tokenizer() -> BertTokenizer:
    """Whole words only, the class of the real judge's tokenizer."""
    words = [*WORDS, *NAMES, *COLORS]
    return BertTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        additional_special_tokens=["[DEC]", "[ENC]"],
        model_max_length=35,
    )


def config(vocabulary: int, dec: int) -> BlipConfig:
    """A hundredth of the real judge's width, the same class."""
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
            initializer_range=0.02,  # the class default of 1e-10 leaves the tower dead
        ),
        projection_dim=WIDTH, image_text_hidden_size=WIDTH,
    )  # fmt: skip


def _optimizer(parameters: list[Parameter], lr: float, steps: int) -> tuple[AdamW, OneCycleLR]:
    optimizer = AdamW(parameters, lr=lr, weight_decay=0.01)
    return optimizer, OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)


def train_vision(model: BlipForQuestionAnswering, steps: int, batch: int, rng: np.random.Generator) -> None:
    """Stage 1: presence labels from the maximum over the image tokens."""
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
    """Scenes with the frozen vision tower's tokens of their images; some are drawn anew at each batch."""

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
        """`size` scenes with their tokens, after `fresh` places were drawn anew."""
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
    """Learn to answer the questions of each step's `lesson`; `accuracy` is where the running mean begins."""
    optimizer, schedule = _optimizer(parameters, lr, steps)
    start, right = time.time(), accuracy
    choice = yes_no(words)
    for step in range(steps):
        features, asked = lesson(step)
        rows = torch.arange(len(asked)).repeat_interleave(len(asked[0]))
        logits = answers(model, choice, features, rows, encode(model, words, [q for some in asked for q, _ in some]))
        target = torch.tensor([0 if truth else 1 for some in asked for _, truth in some])
        loss = F.cross_entropy(logits, target)
        _step(loss, parameters, optimizer, schedule)
        right = 0.98 * right + 0.02 * (logits.argmax(1) == target).float().mean().item()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name} {step} loss {loss.item():.4f} accuracy {right:.4f} {time.time() - start:.0f} s", flush=True)


def train_text(
    model: BlipForQuestionAnswering,
    words: BertTokenizer,
    steps: int,
    batch: int,
    rng: np.random.Generator,
    lr: float = 6e-4,
) -> None:
    """Stage 2: text encoder and decoder on frozen features, two questions a scene.

    The first fifth of the steps asks for presence alone: from there the step to colours is short, while all questions
    at once leave it at chance for long.
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
    """Stage 3: the whole judge, four questions a fresh scene, of which half are spoiled."""

    def lesson(step: int) -> Lesson:
        scenes = [sample_scene(rng) for _ in range(batch)]
        drawn = [spoiled(s, rng) if rng.random() < 0.5 else (draw(s), s, []) for s in scenes]
        features = model.vision_model(pixel_values=pixels([p for p, _, _ in drawn], rng)).last_hidden_state
        return features, [[question(truth, rng, gone=gone) for _ in range(4)] for _, truth, gone in drawn]

    _train_answers("judge", model, words, list(model.parameters()), steps, lr, 0.95, lesson)


@torch.no_grad()
def sketches(teacher: Path, count: int, rng: np.random.Generator, guidance_scale: float = 3.0) -> list[Sketch]:
    """What the teacher makes of noised drawings in one step or two, read by the drawing program.

    Such images lie between right and melted, as those of few-step models do.
    """
    settings = PolicySettings(trainable=False, guidance_scale=guidance_scale)
    policy = find_policy(str(teacher)).load(str(teacher), settings)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    found: list[Sketch] = []
    while len(found) < count:
        scenes = [sample_scene(rng) for _ in range(64)]
        prompt = policy.encode([caption(scene, rng) for scene in scenes])
        x = policy.encode_images(torch.from_numpy(np.stack([draw(s) for s in scenes])).permute(0, 3, 1, 2) / 255)
        # One step from much noise; for half of them a second from less, which sharpens what the first has sketched.
        for low, high, share in ((300, 950, 1.0), (150, 600, 0.5)):
            t = torch.randint(low, high, (len(x),), generator=generator)
            noise = torch.randn(x.shape, generator=generator)
            again = policy.denoise(add_noise(x, noise, *policy.schedule(t)), t, prompt)
            keep = torch.rand(len(x), generator=generator) < share
            x = torch.where(keep[:, None, None, None], again, x)
        images = (policy.decode(x).permute(0, 2, 3, 1) * 255).round().byte().numpy()
        found += [(image, scene, read(image)) for image, scene in zip(images, scenes, strict=True)]
    return found


def asked_of(sketch: Sketch, rng: np.random.Generator) -> tuple[str, bool]:
    """A question about a thing of the scene, or now and then about another, and what the reading answers."""
    _, scene, regions = sketch
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if rng.random() < 0.2:
        thing = replace(thing, shape=str(rng.choice(list(SHAPES))))
    if rng.random() < 0.25:
        thing = replace(thing, color=str(rng.choice(list(COLORS))))
    there, colored = answers_of(regions, [thing])
    if rng.random() < 0.5:
        return f"is there {'an' if thing.shape[0] in 'aeiou' else 'a'} {thing.shape}?", there
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
    """Stage 4: the whole judge, on drawings, spoiled drawings and the teacher's sketches, four questions each."""
    known = sketches(teacher, pool, rng)

    def lesson(step: int) -> Lesson:
        some = [known[i] for i in rng.integers(0, len(known), batch // 2)]
        scenes = [sample_scene(rng) for _ in range(batch - len(some))]
        drawn = [spoiled(s, rng) if rng.random() < 0.5 else (draw(s), s, []) for s in scenes]
        images = [p for p, _, _ in drawn]
        # The reading judges pixels as they are, so sketches are not roughened.
        inputs = torch.cat([pixels(images, rng), pixels([p for p, _, _ in some], rng, rough=0.0)])
        features = model.vision_model(pixel_values=inputs).last_hidden_state
        asked = [[question(truth, rng, gone=gone) for _ in range(4)] for _, truth, gone in drawn]
        return features, asked + [[asked_of(sketch, rng) for _ in range(4)] for sketch in some]

    _train_answers("sketches", model, words, list(model.parameters()), steps, lr, 0.85, lesson)


def train(
    out: Path,
    vision_steps: int = 5000,
    text_steps: int = 5000,
    together_steps: int = 1000,
    batch: int = 64,
    seed: int = 1,
) -> None:
    """All stages; saves model and tokenizer to `out`."""
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


def train_again(first: Path, teacher: Path, out: Path, steps: int = 1000, batch: int = 48, seed: int = 7) -> None:
    """The last stage, from the judge in `first`; saves model and tokenizer to `out`."""
    torch.manual_seed(seed)
    words = BertTokenizer.from_pretrained(first)
    model = BlipForQuestionAnswering.from_pretrained(first).float().train()
    train_on_sketches(model, words, teacher, steps, batch, np.random.default_rng(seed))
    model.eval().save_pretrained(out)
    words.save_pretrained(out)
