"""Methods that others are compared with, one file each."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "gors_lcm",
        "alignkit_baselines.gors_lcm:GorsLCM",
        "Sample several, keep the best, distil on it; any black-box reward",
    )
