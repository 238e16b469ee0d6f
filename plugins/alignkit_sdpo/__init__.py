"""SDPO: differences of dense rewards between two trajectories from one initial noise."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "sdpo",
        "alignkit_sdpo.algorithm:SDPO",
        "Differences of dense rewards between paired trajectories, step by step; any black-box reward",
    )
