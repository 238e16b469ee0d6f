"""The judge: a BlipForQuestionAnswering that learns to answer yes or no about drawings.

Trained end to end from scratch it stays at the majority answer, so it learns in stages: the vision tower first learns
what is present (a throw-away linear head over max-pooled tokens), then the text encoder and decoder learn to read the
frozen features, and at the end all of it learns together. Every batch shows fresh scenes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch.nn import Parameter
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

from alignkit_rewards.attribute_binding import answers, encode, yes_no
from alignkit_shapes.scenes import COLORS, SHAPES, SIZE, Scene, draw, mask, sample_scene

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "yes", "no", "is", "are", "there", "the"]
WORDS += ["a", "an", "?", "and", "of", "left", "right", "above", "below", ",", "made", "small", "large"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE = 64
WIDTH = 96


def tokenizer() -> BertTokenizer:
    """Whole words only, the class of the real judge's tokenizer."""
    words = [*WORDS, *SHAPES, *COLORS]
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


def _warped(outline: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A mask (SIZE, SIZE) moved by a smooth random field of `strength` pixels."""
    field = ndimage.gaussian_filter(rng.standard_normal((2, SIZE, SIZE)), (0, 5, 5))
    moved = np.mgrid[:SIZE, :SIZE] + strength * field / field.std()
    bent: np.ndarray = ndimage.map_coordinates(outline, moved, order=1)
    return bent


def _blended(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An outline halfway between two masks."""
    share = rng.uniform(0.4, 0.6)
    soft = ndimage.gaussian_filter(share * first + (1 - share) * second, 2.0)
    halfway: np.ndarray = np.clip((soft - 0.5) * 6 + 0.5, 0, 1)
    return halfway


def spoiled(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Scene, list[str]]:
    """The scene as a few-step model might draw it: some outlines melted or between two shapes, some colours mixed.

    The picture, uint8 (SIZE, SIZE, 3); what is still true of it, where a thing of mixed colour has the colour ""; and
    the shapes that are gone.
    """
    picture: np.ndarray = np.empty((SIZE, SIZE, 3))
    picture[:] = scene.ground
    kept, gone = [], []
    for thing in scene.things:
        outline = np.asarray(mask(thing.shape, thing.x, thing.y, thing.radius), np.float32) / 255
        paint = np.broadcast_to(np.array(COLORS[thing.color], np.float32), picture.shape)
        color, chance = thing.color, rng.random()
        if chance < 0.2:
            outline = _warped(outline, rng.uniform(2.5, 4.5), rng)
        elif chance < 0.35:
            other = str(rng.choice([s for s in SHAPES if s != thing.shape]))
            outline = _blended(outline, np.asarray(mask(other, thing.x, thing.y, thing.radius), np.float32) / 255, rng)
        elif chance < 0.6:
            other = str(rng.choice([c for c in COLORS if c != thing.color]))
            angle = rng.uniform(0, 2 * np.pi)
            y, x = np.mgrid[:SIZE, :SIZE]
            along = ((x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle)) / thing.radius
            share = np.clip(0.5 + along * rng.uniform(0.5, 2), 0, 1)[..., None]
            paint, color = share * paint + (1 - share) * np.array(COLORS[other], np.float32), ""
        if chance < 0.35:
            gone.append(thing.shape)
        else:
            kept.append(replace(thing, color=color))
        picture = outline[..., None] * paint + (1 - outline[..., None]) * picture
    return picture.round().astype(np.uint8), Scene(tuple(kept), scene.ground), gone


def pixels(pictures: list[np.ndarray], rng: np.random.Generator) -> torch.Tensor:
    """Normalised pictures; half of them blurred or noisy as a decoder's are, so that the judge reads samples too."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    rough = torch.from_numpy(rng.random(len(pictures)) < 0.5)
    width = float(rng.uniform(0.3, 1.1))
    taps = torch.exp(-((torch.arange(-2, 3).float() / width) ** 2) / 2)
    taps = taps / taps.sum()
    kernel = (taps[:, None] * taps[None, :]).expand(3, 1, 5, 5)
    soft = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)) * float(rng.uniform(0, 0.05))
    x = torch.where(rough[:, None, None, None], (soft + noise).clamp(0, 1), x)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def labels(scene: Scene) -> np.ndarray:
    """What is present: shapes, then coloured shapes."""
    shapes, colors = list(SHAPES), list(COLORS)
    out = np.zeros(len(shapes) * (1 + len(colors)), dtype=np.float32)
    for thing in scene.things:
        place = shapes.index(thing.shape)
        out[place] = 1
        out[len(shapes) + place * len(colors) + colors.index(thing.color)] = 1
    return out


def question(scene: Scene, rng: np.random.Generator, colors: bool = True, gone: Sequence[str] = ()) -> tuple[str, bool]:
    """A question and its true answer, yes as often as no; the wrong colour is most often that of another thing.

    `gone` are shapes that are no longer what they were; a question about what is absent is most often about them.
    """
    there = {t.shape: t for t in scene.things}
    clear = [t for t in scene.things if t.color]
    truth = bool(rng.random() < 0.5) and bool(there)
    absent = [s for s in SHAPES if s not in there]
    if gone and rng.random() < 0.7:
        absent = list(gone)
    if not colors or rng.random() < 0.35 or (truth and not clear):
        shape = str(rng.choice(list(there) if truth else absent))
        return f"is there {'an' if shape[0] in 'aeiou' else 'a'} {shape}?", truth
    if not truth and (not there or rng.random() < (0.5 if gone else 0.2)):
        return f"is the {rng.choice(absent)} {rng.choice(list(COLORS))}?", False
    if truth:
        thing = clear[int(rng.integers(len(clear)))]
        return f"is the {thing.shape} {thing.color}?", True
    thing = there[str(rng.choice(list(there)))]
    others = [t.color for t in clear if t.color != thing.color]
    if not others or rng.random() < 0.4:
        others = [c for c in COLORS if c != thing.color]
    return f"is the {thing.shape} {rng.choice(others)}?", False


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
    """Scenes with the frozen vision tower's tokens of their pictures; some are drawn anew at each batch."""

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
    parameters = [*model.text_encoder.parameters(), *model.text_decoder.parameters()]
    optimizer, schedule = _optimizer(parameters, lr, steps)
    start, right = time.time(), 0.5
    choice = yes_no(words)
    pool = Features(model, 3000, rng)
    for step in range(steps):
        scenes, features = pool.batch(batch, fresh=6)
        asked = [question(s, rng, colors=step >= steps // 5) for s in scenes for _ in range(2)]
        rows = torch.arange(batch).repeat_interleave(2)
        logits = answers(model, choice, features, rows, encode(model, words, [q for q, _ in asked]))
        target = torch.tensor([0 if truth else 1 for _, truth in asked])
        loss = F.cross_entropy(logits, target)
        _step(loss, parameters, optimizer, schedule)
        right = 0.98 * right + 0.02 * (logits.argmax(1) == target).float().mean().item()
        if step % 100 == 0 or step == steps - 1:
            print(f"text {step} loss {loss.item():.4f} accuracy {right:.4f} {time.time() - start:.0f} s", flush=True)


def train_together(
    model: BlipForQuestionAnswering,
    words: BertTokenizer,
    steps: int,
    batch: int,
    rng: np.random.Generator,
    lr: float = 2e-4,
) -> None:
    """Stage 3: the whole judge, four questions a fresh scene, of which half are spoiled."""
    parameters = list(model.parameters())
    optimizer, schedule = _optimizer(parameters, lr, steps)
    start, right = time.time(), 0.95
    choice = yes_no(words)
    for step in range(steps):
        scenes = [sample_scene(rng) for _ in range(batch)]
        drawn = [spoiled(s, rng) if rng.random() < 0.5 else (draw(s), s, []) for s in scenes]
        features = model.vision_model(pixel_values=pixels([p for p, _, _ in drawn], rng)).last_hidden_state
        asked = [question(truth, rng, gone=gone) for _, truth, gone in drawn for _ in range(4)]
        rows = torch.arange(batch).repeat_interleave(4)
        logits = answers(model, choice, features, rows, encode(model, words, [q for q, _ in asked]))
        target = torch.tensor([0 if truth else 1 for _, truth in asked])
        loss = F.cross_entropy(logits, target)
        _step(loss, parameters, optimizer, schedule)
        right = 0.98 * right + 0.02 * (logits.argmax(1) == target).float().mean().item()
        if step % 100 == 0 or step == steps - 1:
            print(f"judge {step} loss {loss.item():.4f} accuracy {right:.4f} {time.time() - start:.0f} s", flush=True)


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
