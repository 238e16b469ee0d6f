"""Bundled prompt sets. Every setting that takes a file of prompts also takes one of these names.

Each set is a .txt file in this folder. `python -m alignkit.data.prompt_sets.build` writes those made from templates.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
PROMPT_SETS = {
    "animals": "The 45 animals of DDPO and SDPO, one name per prompt",
    "animals_held_out": "15 other animals, chosen by us",
    "attributes": "Two things, each with its own colour, shape, material or texture",
    "attributes_held_out": "The same for things that are not in attributes",
    "counting": "Two to six of one thing, or of each of two things",
    "counting_held_out": "The same for things that are not in counting",
    "spatial": "One thing left of, right of, above, below or next to another",
    "spatial_held_out": "The same for things that are not in spatial",
}
"""Descriptions by name."""


def prompt_file(source: str | Path) -> Path:
    """Return the existing file `source`, else the bundled set of this name, else the (missing) path as it is."""
    path = Path(source)
    return FOLDER / f"{source}.txt" if str(source) in PROMPT_SETS and not path.exists() else path
