"""Regularisers: terms that the trainer adds to the loss of any algorithm."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_regularisers(register: Register) -> None:
    register(
        "lcd",
        "alignkit_regularisers.lcd:LatentConsistency",
        "Latent consistency distillation on captioned images; needs a teacher",
    )
    register(
        "reference",
        "alignkit_regularisers.reference:ReferenceDistance",
        "Squared distance from the predictions of the model before training",
    )
