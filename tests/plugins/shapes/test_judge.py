"""What the judge learns from: questions whose answers are true."""

from __future__ import annotations

import numpy as np

from alignkit_shapes.build.judge import asked_of, sketches
from alignkit_shapes.models import WEIGHTS
from alignkit_shapes.pixel_check import read


def test_what_is_asked_of_a_sketch_is_answered_as_it_is_read() -> None:
    rng = np.random.default_rng(0)
    known = sketches(WEIGHTS / "shapes_teacher", 64, rng)
    replies = []
    for image, scene, regions in known:
        assert image.shape == (64, 64, 3) and regions == read(image)
        for _ in range(4):
            question, reply = asked_of((image, scene, regions), rng)
            words = question.rstrip("?").split()
            shape, color = (words[-1], None) if words[1] == "there" else (words[2], words[-1])
            same = [r for r in regions if r.shape == shape]
            assert reply == (any(r.color == color for r in same) if color else bool(same))
            replies.append(reply)
    # Between right and melted, or there is nothing to learn.
    assert 0.2 < np.mean(replies) < 0.8
