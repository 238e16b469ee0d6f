from __future__ import annotations

import math

from alignkit.training.update import Update
from page_fixtures import EVIL, Elements, plain


def test_an_update_is_a_table_of_its_metrics() -> None:
    cell = Update(3, {"reward": 0.5, "loss": -0.25}, 0.5)._repr_html_()
    assert plain(cell) == "update 3 reward 0.5 loss -0.25"
    assert plain(Update(1, {})._repr_html_()) == "update 1 reward nan"


def test_names_of_metrics_inject_no_element() -> None:
    cell = Update(1, dict.fromkeys(EVIL, math.inf))._repr_html_()
    assert {tag for tag, _ in Elements(cell).found} == {"table", "thead", "tr", "th", "td"}
    assert {name for _, attributes in Elements(cell).found for name in attributes} == {"colspan", "style"}
