"""The embedded world: coloured shapes, models that generate them, and a VQA model that answers questions about them."""

from __future__ import annotations

from pathlib import Path

from alignkit import Register, RegisterRecipe, hookimpl

RECIPES = Path(__file__).parent / "recipes"


@hookimpl
def register_models(register: Register) -> None:
    register(
        "shapes_lcm", "alignkit_shapes.models:shapes_lcm", "Coloured shapes in 1 to 8 steps; embedded, no download"
    )
    register(
        "shapes_turbo",
        "alignkit_shapes.models:shapes_turbo",
        "Coloured shapes like SD-Turbo: predicts the noise, no guidance",
    )
    register(
        "shapes_teacher",
        "alignkit_shapes.models:shapes_teacher",
        "Teacher of shapes_lcm and shapes_turbo; 25 steps or more",
    )


@hookimpl
def register_rewards(register: Register) -> None:
    register(
        "pixel_check",
        "alignkit_shapes.reward:PixelCheck",
        "Attribute binding in images of shapes, checked in the pixels by rules",
    )


@hookimpl
def register_recipes(register: RegisterRecipe) -> None:
    for name in ("lasro_shapes", "lasro_shapes_any_reward"):
        register(name, RECIPES / f"{name}.toml")
