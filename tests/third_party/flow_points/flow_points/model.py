"""The registered model."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from alignkit import ModelBundle
from flow_points.policy import TEXT, Velocity, save

HOME = "FLOW_POINTS"
"""The variable that names the folder of the checkpoint."""
SPREAD = 0.3
"""Standard deviation of the points of one text."""


def points() -> ModelBundle:
    return ModelBundle(
        path=os.environ[HOME],
        defaults={
            "model": {"policy": "flow_points", "lora_rank": 0},
            "sampler": {"name": "ddim", "num_steps": 4, "eta": 1.0},
            "reward": ["rightness"],
        },
        algorithm_defaults={
            "lasro": {
                "sampler": {"name": "renoise", "num_steps": 2},
                "surrogate": {"name": "point_scorer"},
                "regulariser": [],
            }
        },
    )


def write(folder: Path) -> None:
    """Train a network and write its checkpoint, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(folder, train(Velocity(width=64)).state_dict())


def train(network: Velocity, steps: int = 300, rows: int = 512) -> Velocity:
    """Conditional flow matching: points around half of the first two features of the text."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        text = torch.rand(rows, TEXT) * 2 - 1
        clean, noise, t = text[:, :2] / 2 + SPREAD * torch.randn(rows, 2), torch.randn(rows, 2), torch.rand(rows)
        x = torch.lerp(clean, noise, t[:, None])
        loss = (network(x, t, text) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network
