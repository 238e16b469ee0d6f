"""Rewards for runs on tiny models: one that is easy to recompute, and some with few distinct or missing scores."""

from __future__ import annotations

from typing import Any

import pytest

from plugin_fixtures import PluginFolder

BRIGHTNESS = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("brightness", "brightness.reward:Brightness", "The mean of all pixels")
"""

BRIGHTNESS_REWARD = """
    from alignkit.interfaces import Reward


    class Brightness(Reward):
        differentiable = True

        def __call__(self, images, examples):
            return images.mean((1, 2, 3))
"""


@pytest.fixture
def brightness(plugins: PluginFolder) -> None:
    """The reward `brightness`, the mean of all pixels."""
    plugins.install("brightness", BRIGHTNESS, reward=BRIGHTNESS_REWARD)


ODD_REWARDS = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("constant", "odd_rewards.rewards:Constant", "The same for every image")
        register("unscored", "odd_rewards.rewards:Unscored", "No image can be scored")
        register("every_second", "odd_rewards.rewards:EverySecond", "Only the first, third, ... image can be scored")
        register("all_but_first", "odd_rewards.rewards:AllButFirst", "The first image cannot be scored")
        register("two_of_three", "odd_rewards.rewards:TwoOfThree", "Every third image cannot be scored")
"""

ODD_REWARD_CLASSES = """
    import torch
    from alignkit.interfaces import Reward
    from alignkit.records import Scores


    class Constant(Reward):
        def __call__(self, images, examples):
            return torch.ones(len(images), dtype=torch.long)


    class Unscored(Reward):
        def valid(self, index):
            return index < 0

        def __call__(self, images, examples):
            valid = self.valid(torch.arange(len(images)))
            return Scores(images.mean((1, 2, 3)), valid, {}, ["" if one else "no reader" for one in valid.tolist()])


    class EverySecond(Unscored):
        def valid(self, index):
            return index % 2 == 0


    class AllButFirst(Unscored):
        def valid(self, index):
            return index > 0


    class TwoOfThree(Unscored):
        def valid(self, index):
            return index % 3 != 0
"""


@pytest.fixture
def odd_rewards(plugins: PluginFolder) -> None:
    """Rewards that give every image the same score or cannot score some images."""
    plugins.install("odd_rewards", ODD_REWARDS, rewards=ODD_REWARD_CLASSES)


def mean_of_pixels(images: Any, examples: Any) -> Any:
    """For the reward `function`."""
    return images.mean((1, 2, 3))
