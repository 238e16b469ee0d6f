"""Training data of the VQA model: questions with true answers."""

from __future__ import annotations

import numpy as np

from alignkit_shapes.build.judge import sketch_question, sketches
from alignkit_shapes.models import WEIGHTS
from alignkit_shapes.pixel_check import find_regions


def test_questions_about_a_sketch_have_the_pixel_checks_answers() -> None:
    rng = np.random.default_rng(0)
    known = sketches(WEIGHTS / "shapes_teacher", 64, rng)
    replies = []
    for image, scene, regions in known:
        assert image.shape == (64, 64, 3) and regions == find_regions(image)
        for _ in range(4):
            question, reply = sketch_question((image, scene, regions), rng)
            words = question.rstrip("?").split()
            shape, color = (words[-1], None) if words[1] == "there" else (words[2], words[-1])
            same = [r for r in regions if r.shape == shape]
            assert reply == (any(r.color == color for r in same) if color else bool(same))
            replies.append(reply)
    # Sketches must range from correct to melted, or there is nothing to learn.
    assert 0.2 < np.mean(replies) < 0.8
