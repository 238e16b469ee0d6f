"""A broken promise is found, and reported in one line; one test a promise: models."""

from __future__ import annotations

import re
import textwrap

import pytest

from alignkit.testing import (
    check_model,
)
from alignkit.testing.world import tiny_pipeline
from plugin_fixtures import PluginFolder

BUNDLES = """
    from alignkit.interfaces import ModelBundle as Bundle

    CALLS = []

    def growing():
        return Bundle("a/b", defaults={"train": {"updates": 2}})

    LOST = Bundle("/nowhere/at/all")
    TEACHERLESS = Bundle("a/b", teacher="x")
    WRONG = Bundle("a/b", algorithm_defaults={"ddpo": {"algorithm": {"samples": "two"}}})
    IMAGES = Bundle(HERE, defaults={
        "sampler": {"name": "lcm"}, "data": {"images": "bundles.models:Photos"},
    })

    class Photos: ...
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost", "model: '/nowhere/at/all' is no folder and no hub id"),
        ("teacherless", "model: 'x' is no folder and no hub id"),
        ("wrong", 'under ddpo: model wrong: algorithm.samples: found "two", expected integer'),
        ("images", "data.images: 'bundles.models:Photos' gives no source at 64 pixels: data.images: bundles"),
    ],
)
def test_a_model(plugins: PluginFolder, name: str, message: str) -> None:
    init = "from alignkit import hookimpl\n\n@hookimpl\ndef register_models(register):\n"
    for one in ("growing", "lost", "teacherless", "wrong", "images"):
        target = one if one == "growing" else one.upper()
        init += f'    register("{one}", "bundles.models:{target}", "One")\n'
    source = textwrap.dedent(BUNDLES).replace("HERE", repr(str(tiny_pipeline())))
    plugins.install("bundles", init, models=source)
    assert check_model("growing") == "its settings under lasro"
    with pytest.raises(AssertionError, match=f"^model {name}: {re.escape(message)}"):
        check_model(name)
