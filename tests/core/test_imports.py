from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alignkit.imports import import_name, is_name, origin


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; the search path and the modules are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.mark.parametrize("text", ["m:f", "package.module:Name", "größe:f"])
def test_a_name_has_a_module_and_an_attribute(text: str) -> None:
    assert is_name(text)


@pytest.mark.parametrize("text", ["", "m", "m:", ":f", "m.:f", "../m:f", "m:f.g", "m:f()", "m f:g", "http://m:1"])
def test_other_texts_are_no_names(text: str) -> None:
    assert not is_name(text)
    with pytest.raises(ValueError, match=r'expected "package\.module:Name"'):
        import_name(text)


def test_installed_packages_and_those_installed_in_place_count_as_installed() -> None:
    for text in ("torch.nn:Module", "alignkit_shapes.data:Drawings", "numpy:array"):
        assert origin(text).installed and Path(origin(text).place).is_file()


def test_the_library_of_python_and_the_working_folder_do_not_count(here: Path) -> None:
    (here / "mine.py").write_text("raise SystemExit('imported')")
    (here / "names" / "inner").mkdir(parents=True)
    (here / "names" / "inner" / "own.py").write_text("value = 1")
    assert origin("mine:f").place == str((here / "mine.py").resolve()) and not origin("mine:f").installed
    assert origin("names.inner.own:value").place.endswith("own.py") and not origin("names.inner.own:value").installed
    for text in ("os:_exit", "subprocess:call", "builtins:exec", "sys:exit", "missing_module:f"):
        assert not origin(text).installed
    assert "mine" not in sys.modules and "names" not in sys.modules
    assert import_name("names.inner.own:value") == 1


def test_a_file_of_the_working_folder_hides_no_installed_package(here: Path) -> None:
    (here / "numpy.py").write_text("")
    monkey = [name for name in sys.modules if name.partition(".")[0] == "numpy"]
    assert monkey and origin("numpy:array").installed
