"""The embedded models, with the run settings that suit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignkit.interfaces import ModelBundle

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "weights"

_data: dict[str, Any] = {
    "data": {"prompts": str(FOLDER / "prompts" / "train.txt"), "pictures": "alignkit_shapes.data:Drawings"},
    "evaluate": {"prompts": str(FOLDER / "prompts" / "held_out.txt"), "rewards": ["shapes_reading"]},
    "reward": [{"name": "attribute_binding", "judge": str(WEIGHTS / "judge")}],
}


def shapes_lcm() -> ModelBundle:
    """The few-step model; guidance as it was distilled with."""
    guidance = {"w_min": 1.0, "w_max": 3.0}
    return ModelBundle(
        path=str(WEIGHTS / "shapes_lcm"),
        teacher=str(WEIGHTS / "shapes_teacher"),
        defaults={"model": {"guidance": 2.0}, "sampler": {"name": "lcm", "num_steps": 2}, **_data},
        algorithm_defaults={"lasro": {"algorithm": guidance}, "lcd": {"algorithm": guidance}},
    )


def shapes_teacher() -> ModelBundle:
    """The many-step model."""
    return ModelBundle(
        path=str(WEIGHTS / "shapes_teacher"),
        defaults={
            "model": {"guidance": 2.0},
            "sampler": {"name": "ddim", "num_steps": 25, "eta": 0.0},
            **_data,
            "evaluate": {**_data["evaluate"], "steps": [25]},
        },
    )
