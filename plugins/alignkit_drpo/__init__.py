"""DrPO: the features of a model's samples drift towards the better ones and away from the worse."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "drpo",
        "alignkit_drpo.algorithm:DrPO",
        "Features of samples drift to the better half of a ranking; one step or few; any black-box reward",
    )
