"""Checks that hold what a plugin brings to its interface; needs no pytest.

    from alignkit.testing import check_reward

    def test_sharpness_keeps_its_promises() -> None:
        check_reward(Sharpness())

Each raises AssertionError with one line: what was found, what was expected. `alignkit check-plugin` runs them on all
that an installed plugin brings.
"""

from __future__ import annotations

from alignkit.testing.algorithm import check_algorithm, refusal, tiny_trainer
from alignkit.testing.data import check_images, check_pairs
from alignkit.testing.model import check_model
from alignkit.testing.policy import check_policy
from alignkit.testing.regulariser import check_regulariser
from alignkit.testing.reward import check_reward
from alignkit.testing.sampler import check_sampler
from alignkit.testing.surrogate import check_surrogate
from alignkit.testing.world import coarse_images, tiny_pipeline, tiny_policy

__all__ = [
    "check_algorithm",
    "check_images",
    "check_model",
    "check_pairs",
    "check_policy",
    "check_regulariser",
    "check_reward",
    "check_sampler",
    "check_surrogate",
    "coarse_images",
    "refusal",
    "tiny_pipeline",
    "tiny_policy",
    "tiny_trainer",
]
