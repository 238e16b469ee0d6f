"""A promise of a policy that is broken is found, and reported in one line; one case a promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit.config.bundles import find_policy
from alignkit.interfaces import Policy
from alignkit.records import PolicySettings
from alignkit.registry import default_registry
from alignkit.testing import check_policy, tiny_policy
from alignkit.testing.world import Form
from broken_policies import CASES, Members


@pytest.mark.parametrize(("members", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_policy_that_breaks_a_promise(
    flow_points: None, flow_checkpoint: Path, members: Members, message: str
) -> None:
    base = default_registry().get("policy", "flow_points")
    policy = type("Broken", (base,), members(base)).load(str(flow_checkpoint), PolicySettings(lora_rank=0))  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match=f"^policy Broken: ({message})") as caught:
        check_policy(policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("form", ["lcm", "teacher", "turbo"])
def test_pipelines_of_every_form_keep_the_promises(form: Form, trainable: bool) -> None:
    check_policy(tiny_policy(form, trainable))


def test_a_pipeline_whose_weights_are_all_trained_keeps_them_too(tiny_lcm: Path) -> None:
    check_policy(find_policy(str(tiny_lcm)).load(str(tiny_lcm), PolicySettings(lora_rank=0)))


def test_what_is_checked_is_left_as_it_was(flow_points: None, flow_checkpoint: Path) -> None:
    policy: Policy = find_policy(str(flow_checkpoint)).load(str(flow_checkpoint), PolicySettings(lora_rank=0))
    before = {name: p.detach().clone() for name, p in policy.weights().items()}
    check_policy(policy)
    assert all(torch.equal(p, before[name]) for name, p in policy.weights().items())
