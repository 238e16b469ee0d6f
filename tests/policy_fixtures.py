"""The plugin of a third party in tests/third_party, with a checkpoint that is trained once."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from plugin_fixtures import PluginFolder

PROJECT = Path(__file__).parent / "third_party" / "flow_points"


@pytest.fixture(scope="session")
def flow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained velocity network on points."""
    folder = tmp_path_factory.mktemp("points")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROJECT))
        import_module("flow_points.model").write(folder)
    return folder


@pytest.fixture
def flow_points(plugins: PluginFolder, flow_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin, installed, with its model at the checkpoint."""
    monkeypatch.setenv("FLOW_POINTS", str(flow_checkpoint))
    plugins.install_project(PROJECT)
