"""The drawing program, its captions, the pixel check of its drawings, and the held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import alignkit_shapes
from alignkit.data.prompts import read_examples
from alignkit.errors import ConfigError
from alignkit.records import Example
from alignkit_shapes.build.prompts import HELD_OUT, write
from alignkit_shapes.build.text import LENGTH, tokenizer
from alignkit_shapes.data import DrawingPairs, Drawings
from alignkit_shapes.models import WEIGHTS
from alignkit_shapes.pixel_check import answers, exact, find_regions
from alignkit_shapes.reward import PixelCheck, things_of
from alignkit_shapes.scenes import COLORS, RADII, SHAPES, SIZE, Scene, Thing, caption, draw, sample_scene

PROMPTS = Path(alignkit_shapes.__file__).parent / "prompts"


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def test_the_pixel_check_recognises_every_drawing_exactly() -> None:
    wrong = [s for s in scenes(200) if not exact(find_regions(draw(s)), list(s.things))]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("radius", RADII)
def test_every_shape_in_every_colour_is_recognised_at_the_smallest_and_largest_size(radius: float) -> None:
    for shape in SHAPES:
        for color in COLORS:
            thing = Thing(shape, color, SIZE / 2 + 0.3, SIZE / 2 - 0.4, radius)
            assert exact(find_regions(draw(Scene((thing,)))), [thing]), thing


def test_captions_name_exactly_the_things_in_the_scene() -> None:
    rng = np.random.default_rng(1)
    for scene in scenes(200, seed=1):
        named = {(t.shape, t.color) for t in things_of(caption(scene, rng))}
        assert named == {(t.shape, t.color) for t in scene.things}


def test_spatial_captions_are_true() -> None:
    rng, seen = np.random.default_rng(2), set()
    for scene in scenes(300, seed=2):
        text = caption(scene, rng)
        if relation := next((r for r in ("left of", "right of", "above", "below") if r in text), None):
            first, second = (next(t for t in scene.things if t.shape == n.shape) for n in things_of(text))
            seen.add(relation)
            assert {
                "left of": first.x < second.x, "right of": first.x > second.x,
                "above": first.y < second.y, "below": first.y > second.y,
            }[relation]  # fmt: skip
    assert len(seen) == 4


def test_shapes_of_a_scene_are_distinct_inside_the_image_and_apart() -> None:
    for scene in scenes(100, seed=3):
        assert len({t.shape for t in scene.things}) == len(scene.things)
        assert all(t.radius * 1.1 <= min(t.x, t.y) and max(t.x, t.y) <= SIZE - t.radius * 1.1 for t in scene.things)


def test_questions_about_shape_and_colour_are_answered_separately() -> None:
    image = draw(Scene((Thing("circle", "red", 20, 20, 10), Thing("square", "blue", 44, 44, 10))))
    things = [Thing("circle", "blue"), Thing("square", "blue"), Thing("heart", "red")]
    assert answers(find_regions(image), things) == [True, False, True, True, False, False]


def test_a_plain_ground_and_noise_have_no_shapes() -> None:
    assert find_regions(draw(Scene(()))) == []
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert not exact(find_regions(noise), [Thing("circle", "red")])


def test_no_training_prompt_names_a_held_out_pair_and_every_held_out_prompt_does() -> None:
    train, chosen_by, test = (read_examples(PROMPTS / f"{name}.txt") for name in ("train", "held_out", "test"))
    assert len(train) == 400 and len(chosen_by) == 200 and len(test) == 400
    held_out = [*chosen_by, *test]
    assert len({e.text for e in held_out}) == 600
    pairs = [{(t.shape, t.color) for t in things_of(e.text)} for e in train]
    assert not any(p & HELD_OUT for p in pairs)
    assert all({(t.shape, t.color) for t in things_of(e.text)} & HELD_OUT for e in held_out)
    # Shape and colour of a held-out pair are both in the training prompts; only their combination is new.
    assert {shape for p in pairs for shape, _ in p} == set(SHAPES)
    assert {color for p in pairs for _, color in p} == set(COLORS)
    assert not any(relation in e.text for e in train for relation in ("left of", "right of", "above", "below"))


def test_the_shipped_prompts_equal_those_that_the_build_writes(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("train.txt", "held_out.txt", "test.txt"):
        assert (tmp_path / name).read_text() == (PROMPTS / name).read_text()


def test_the_shipped_tokenizer_equals_the_one_that_is_built() -> None:
    for model in ("shapes_lcm", "shapes_teacher"):
        shipped = json.loads((WEIGHTS / model / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
        for _ in range(5):  # hashes differ each time
            assert json.loads(tokenizer().backend_tokenizer.to_str())["model"] == shipped["model"]


def test_no_prompt_is_too_long_for_the_text_encoder() -> None:
    words = tokenizer()
    texts = [e.text for name in ("train", "held_out", "test") for e in read_examples(PROMPTS / f"{name}.txt")]
    assert max(len(words(text).input_ids) for text in texts) <= LENGTH
    assert words.decode(words("an orange ring").input_ids, skip_special_tokens=True).strip() == "an orange ring"


def test_drawings_depend_only_on_seed_and_position() -> None:
    images, captions = Drawings(SIZE).batch(0, 8, seed=5)
    assert images.shape == (8, 3, SIZE, SIZE) and 0 <= float(images.min()) < float(images.max()) <= 1
    later, later_captions = Drawings(SIZE).batch(3, 4, seed=5)
    assert torch.equal(later, images[3:7]) and later_captions == captions[3:7]
    assert Drawings(SIZE).batch(0, 8, seed=6)[1] != captions


def test_in_a_pair_of_drawings_the_first_is_correct_and_the_second_is_not() -> None:
    pairs = DrawingPairs(SIZE).batch(0, 48, seed=5)
    examples = [Example(caption) for caption in pairs.captions]
    check = PixelCheck()
    assert check(pairs.winners, examples).values.tolist() == [1.0] * 48
    changed = (pairs.winners - pairs.losers).abs().amax((1, 2, 3))
    assert float(changed.min()) > 0.1
    # The pixel check is coarse: it still recognises some of the melted outlines.
    assert float(check(pairs.losers, examples).parts["exact"].mean()) < 0.4
    later = DrawingPairs(SIZE).batch(40, 8, seed=5)
    assert torch.equal(later.losers, pairs.losers[40:]) and later.captions == pairs.captions[40:]


def test_the_pixel_check_scores_correct_drawings_one_and_others_by_the_share_of_yes_answers() -> None:
    images, captions = Drawings(SIZE).batch(0, 16, seed=0)
    scores = PixelCheck()(images, [Example(c) for c in captions])
    assert scores.values.tolist() == [1.0] * 16 and scores.parts["exact"].tolist() == [1.0] * 16
    drawing = draw(Scene((Thing("circle", "red", 20, 20, 10),)))
    image = torch.from_numpy(drawing.copy()).permute(2, 0, 1)[None] / 255
    scores = PixelCheck()(image, [Example("a blue circle and a red square")])
    assert scores.values.tolist() == [0.25] and scores.parts["exact"].tolist() == [0.0]


def test_the_pixel_check_of_a_png_file_equals_that_of_the_image_in_memory(tmp_path: Path) -> None:
    images, captions = DrawingPairs(SIZE).batch(0, 8, seed=0).losers, DrawingPairs(SIZE).batch(0, 8, seed=0).captions
    levels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, one in enumerate(levels):
        Image.fromarray(one).save(tmp_path / f"{i}.png")
    read_back = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(8)])
    again = torch.from_numpy(read_back).permute(0, 3, 1, 2).float() / 255
    examples = [Example(caption) for caption in captions]
    found = PixelCheck()(images, examples).values
    assert torch.equal(PixelCheck()(again, examples).values, found) and len(set(found.tolist())) > 1


def test_the_pixel_check_refuses_prompts_without_a_coloured_shape() -> None:
    with pytest.raises(ConfigError, match="'a nice dog' names no coloured shape of the embedded world; expected one"):
        PixelCheck().check([Example("a red circle"), Example("a nice dog")])
