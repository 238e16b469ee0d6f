from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image as Pillow

from alignkit.page.gallery import LARGE, Budget, drift, embed, gallery, ordered, shared, strips
from alignkit.page.record import read_record
from page_fixtures import Write

PROMPTS = [f"prompt {number}" for number in range(20)]
ROOM = 10**7


def test_prompts_are_ordered_by_rise_fall_and_change_and_at_random(write_run: Write) -> None:
    records = [read_record(write_run(prompts=PROMPTS))]
    places, steps = shared(records)
    assert places == list(range(20)) and steps == [1, 2]
    orders = ordered(records, places, steps)
    assert orders["best"][:3] == [0, 1, 2] and orders["worst"][:2] == [19, 18]
    assert sorted(orders["random"]) == places != orders["random"] == ordered(records, places, steps)["random"]
    assert len(orders["most changed"]) == 20


def test_a_card_has_the_images_before_and_after_at_each_number_of_steps(write_run: Write) -> None:
    records = [read_record(write_run())]
    orders = ordered(records, *shared(records))
    cards = gallery(records, orders, [1, 2], Budget(ROOM))
    first = cards[0]
    assert first.prompt == "a red circle"
    assert first.ranks["best"] == 0 and first.ranks["worst"] == 2
    assert [(line.label, line.base, len(line.images)) for line in first.lines] == [("before", None, 2), ("after", 0, 2)]
    assert [image.main for image in first.lines[1].images] == pytest.approx([0.9, 0.9])
    assert first.lines[1].images[0].held_out == 0.25 and first.lines[1].images[0].sharp
    assert first.lines[0].images[0].data != first.lines[1].images[0].data


def test_runs_share_one_image_before_training_if_it_is_the_same(write_run: Write) -> None:
    records = [read_record(write_run("one")), read_record(write_run("two", updates=20))]
    (card, *_) = gallery(records, ordered(records, *shared(records)), [1, 2], Budget(ROOM))
    assert [(line.label, line.run, line.base) for line in card.lines] == [
        ("before", -1, None),
        ("one", 0, 0),
        ("two", 1, 0),
    ]
    Pillow.new("RGB", (32, 32), "white").save(records[1].points[0].images[0, 1].path)
    (card, *_) = gallery(records, ordered(records, *shared(records)), [1, 2], Budget(ROOM))
    assert [(line.label, line.base) for line in card.lines] == [
        ("one, before", None), ("one", 0), ("two, before", None), ("two", 2),
    ]  # fmt: skip


def test_runs_with_other_prompts_share_no_gallery(write_run: Write) -> None:
    assert shared([read_record(write_run("one")), read_record(write_run("two", prompts=["x"]))]) == ([], [])
    assert shared([read_record(write_run("three", prompts=()))]) == ([], [])


def test_images_are_left_out_where_there_is_no_room(write_run: Write) -> None:
    records = [read_record(write_run(prompts=PROMPTS))]
    orders = ordered(records, *shared(records))
    all_cards = gallery(records, orders, [1, 2], Budget(ROOM))
    budget = Budget(30_000)
    some = gallery(records, orders, [1, 2], budget)
    assert 0 < len(some) < len(all_cards) and budget.room >= 0
    size = sum(len(image.data) for card in some for line in card.lines for image in line.images)
    assert size <= 30_000 - budget.room
    assert gallery(records, orders, [1, 2], Budget(0)) == [] == strips(records, [0], [1], Budget(0))
    # Every order has its share of what there is room for.
    assert min(Counter(order for card in some for order in card.ranks).values()) >= 1


def test_a_strip_has_an_image_for_each_point_and_marks_the_exported_one(write_run: Write) -> None:
    record = read_record(write_run())
    (card,) = strips([record], [1], [1, 2], Budget(ROOM))
    assert [line.label for line in card.lines] == ["1 step", "2 steps"]
    assert [(image.label, image.marked) for image in card.lines[0].images] == [
        ("0", False), ("20", False), ("40", True),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_large_images_are_scaled_down_and_small_ones_kept(
    write_run: Write, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.page.gallery.features.check", lambda feature: feature == kind)
    folder = write_run(size=1024)
    data, sharp = embed(folder / "points" / "000040" / "000_1steps.png", LARGE)
    assert data.startswith(f"data:image/{kind};base64,") and not sharp and len(data) < 20_000
    data, sharp = embed(write_run("small") / "points" / "000040" / "000_1steps.png", LARGE)
    assert data.startswith("data:image/png;base64,") and sharp


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_a_file_that_is_no_image_leaves_a_gap(write_run: Write, content: bytes) -> None:
    record = read_record(write_run())
    record.points[40].images[0, 1].path.write_bytes(content)
    orders = ordered([record], *shared([record]))
    card = gallery([record], orders, [1, 2], Budget(ROOM))[0]
    assert [bool(image.data) for image in card.lines[1].images] == [False, True]
    assert np.isfinite(drift(record, 1)[40])


def test_drift_is_the_mean_change_of_pixels_since_before_training(write_run: Write) -> None:
    record = read_record(write_run())
    # Only the red channel changes: by 80 and 160 of 255.
    found = drift(record, 2)
    assert found == pytest.approx({0: 0.0, 20: 80 / 255 / 3**0.5, 40: 160 / 255 / 3**0.5})


def test_images_without_a_score_are_shown_and_have_no_rank_by_it(write_run: Write) -> None:
    folder = write_run()
    for scores in folder.glob("points/*/scores.json"):
        entries = [entry | {"scores": {"reward": None}} for entry in json.loads(scores.read_text())]
        scores.write_text(json.dumps(entries))
    records = [read_record(folder)]
    orders = ordered(records, *shared(records))
    assert orders["best"] == [] and len(orders["random"]) == 3
    assert gallery(records, orders, [1, 2], Budget(ROOM))[0].lines[0].images[0].main is None
