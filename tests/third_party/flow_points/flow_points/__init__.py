"""A third party's plugin: a flow-matching model of points in the plane, with a reward and a surrogate of its own."""

from __future__ import annotations

from pathlib import Path

from alignkit import Register, RegisterRecipe, hookimpl


@hookimpl
def register_policies(register: Register) -> None:
    register("flow_points", "flow_points.policy:FlowPoints", "Velocity networks on points in the plane")


@hookimpl
def register_models(register: Register) -> None:
    register("points", "flow_points.model:points", "Points around a centre that the text decides")


@hookimpl
def register_rewards(register: Register) -> None:
    register("rightness", "flow_points.reward:Rightness", "How far to the right the bright part of an image is")


@hookimpl
def register_surrogates(register: Register) -> None:
    register("point_scorer", "flow_points.surrogate:PointScorer", "A network that scores points")


@hookimpl
def register_recipes(register: RegisterRecipe) -> None:
    register("points_taught_first", Path(__file__).parent / "points_taught_first.toml")
