"""Methods that others are compared with, one file each."""

from __future__ import annotations

from alignkit import hookimpl
from alignkit.hookspecs import Register


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "gors_lcm",
        "alignkit_baselines.gors_lcm:GorsLCM",
        "Draw several, keep the best, distil on it; any black-box reward",
    )
    register(
        "rebel",
        "alignkit_baselines.rebel:REBEL",
        "Regress the difference of two walks' log-likelihoods to that of their rewards; any black-box reward",
    )
    register(
        "d3po",
        "alignkit_baselines.d3po:D3PO",
        "Prefer each step of the better of two walks, as direct preference optimisation does; any black-box reward",
    )
