"""Displays in the cell of a notebook, replaced in place."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from alignkit.page import notebook as module
from alignkit.page.notebook import CellProgress, clock, in_notebook
from page_fixtures import plain

Outputs = list[list[dict[str, str]]]


def last(outputs: Outputs) -> str:
    return plain(outputs[-1][-1]["text/html"])


def test_an_evaluation_shows_one_bar_and_then_its_time(notebook: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    with CellProgress() as bars:
        task = bars.add_task("first, unseen prompts", 4)
        bars.advance(task, 3)
        assert last(notebook) == "first, unseen prompts: 75%"
        bars.remove_task(task)
        bars.add_task("first, seen prompts", 4)
        assert last(notebook) == "first, seen prompts: 0%"
    assert last(notebook) == "done in 0:00" and len(notebook) == 1
    with pytest.raises(KeyboardInterrupt), CellProgress():
        raise KeyboardInterrupt
    assert last(notebook) == "stopped"


def test_a_notebook_is_a_shell_with_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(module.sys.modules, "IPython", raising=False)
    assert not in_notebook()
    for shell, found in ((None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=object()), True)):
        ipython = ModuleType("IPython")
        vars(ipython)["get_ipython"] = lambda shell=shell: shell
        monkeypatch.setitem(module.sys.modules, "IPython", ipython)
        assert in_notebook() == found


def test_durations_are_minutes_and_seconds() -> None:
    assert [clock(seconds) for seconds in (0.4, 61, 3600)] == ["0:00", "1:01", "1:00:00"]
