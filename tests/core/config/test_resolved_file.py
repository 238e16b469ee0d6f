"""The resolved run file that a run writes."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.config.load import to_toml

MODEL = {"model.name": "acme_model", "algorithm.name": "acme_plain"}


@pytest.mark.parametrize("trained", [1, 2])
@pytest.mark.parametrize("algorithm", ["acme_plain", "acme_steps"])
def test_the_resolved_file_loads_to_an_equal_run(load_acme: Any, algorithm: str, trained: int) -> None:
    config = load_acme(
        None,
        MODEL
        | {
            "algorithm.name": algorithm,
            "algorithm.scales": [1, 2.5],
            "algorithm.span": [3, 4],
            "output": 'a "quoted" \\ name\nü\x7f',
            "train.max_grad_norm": float("inf"),
            "train.trackers": ["wandb"],
            "model.guidance_scale": 7.5,
            "reward": [{"name": "acme_red", "weight": 0.1}, {"name": "acme_blue"}][:trained],
            "evaluate.rewards": ["acme_blue", "acme_red"],
            "regulariser": [{"name": "acme_push", "weight": 0.5}, "acme_pull"][: trained - 1],
        },
    )
    assert config.algorithm.fields["span"] == (3, 4)
    text = to_toml(config)
    again = load_acme(text)
    assert again == config and to_toml(again) == text


def test_the_resolved_file_writes_what_was_left_at_its_default(load_acme: Any) -> None:
    text = to_toml(load_acme(None, MODEL))
    assert "rows_per_pass = 32" in text and 'mode = "hard"' in text
