"""The embedded world: coloured shapes, a model that draws them, a judge that answers questions about them."""

from __future__ import annotations

from alignkit import hookimpl
from alignkit.hookspecs import Register


@hookimpl
def register_models(register: Register) -> None:
    register(
        "shapes_lcm", "alignkit_shapes.models:shapes_lcm", "Coloured shapes in 1 to 8 steps; embedded, no download"
    )
    register(
        "shapes_turbo",
        "alignkit_shapes.models:shapes_turbo",
        "The same in SD-Turbo's form: predicts the noise, no guidance",
    )
    register(
        "shapes_teacher",
        "alignkit_shapes.models:shapes_teacher",
        "What both were distilled from; 25 steps and more",
    )


@hookimpl
def register_rewards(register: Register) -> None:
    register(
        "pixel_check",
        "alignkit_shapes.reward:PixelCheck",
        "Attribute binding checked in the pixels of an image of shapes, by rules",
    )
