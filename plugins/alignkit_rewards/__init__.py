"""Rewards that ship with alignkit, one file each."""

from __future__ import annotations

from alignkit import hookimpl
from alignkit.hookspecs import Register


@hookimpl
def register_rewards(register: Register) -> None:
    register(
        "attribute_binding",
        "alignkit_rewards.attribute_binding:AttributeBinding",
        "Does every thing named in the prompt show its attributes? Asked of a BLIP VQA model (LaSRO)",
    )
