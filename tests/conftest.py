"""Fixtures for all tests, by what they make."""

from __future__ import annotations

import pytest

pytest_plugins = [
    "plugin_fixtures", "policy_fixtures", "reward_fixtures", "model_fixtures", "run_fixtures", "scoring_fixtures",
    "image_fixtures", "page_fixtures", "browser_fixtures", "points_fixtures",
]  # fmt: skip
pytest.register_assert_rewrite("method_checks", "families")
