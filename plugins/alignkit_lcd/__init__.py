"""Latent consistency distillation: the loss that several methods use as a regulariser, and the plain method."""

from __future__ import annotations

from alignkit import Register, hookimpl


@hookimpl
def register_algorithms(register: Register) -> None:
    register(
        "lcd",
        "alignkit_lcd.algorithm:LCD",
        "Latent consistency distillation: no reward, from a teacher and captioned images",
    )
