"""Prompt sets that come along, by name: wherever a file of prompts is asked for, one of these names will do.

Each is a .txt file of this folder. `python -m alignkit.data.prompt_sets.build` writes those made from templates.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
PROMPT_SETS = {
    "animals": "The 45 animals of DDPO and SDPO, a name each",
    "animals_held_out": "15 others, chosen by us",
    "attributes": "Two things with a colour, shape, material or texture each: whose is whose?",
    "attributes_held_out": "The same of things that are not in attributes",
    "counting": "Two to six of one thing or of two",
    "counting_held_out": "The same of things that are not in counting",
    "spatial": "One thing left of, right of, above, below or next to another",
    "spatial_held_out": "The same of things that are not in spatial",
}
"""Names, and what is in them."""


def prompt_file(source: str | Path) -> Path:
    """The file that `source` means: one on this disk, or else the set of this name; a missing one if it is neither."""
    path = Path(source)
    return FOLDER / f"{source}.txt" if str(source) in PROMPT_SETS and not path.exists() else path
