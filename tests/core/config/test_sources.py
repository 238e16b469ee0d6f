"""Precedence of the layers: defaults, the model, the run file, overrides."""

from __future__ import annotations

from typing import Any

from alignkit.config.load import RegulariserConfig, RewardConfig

MODEL = {"model.name": "acme_model", "algorithm.name": "acme_plain"}


def test_the_models_settings_stand_above_the_defaults(load_acme: Any) -> None:
    config = load_acme(None, MODEL)
    assert (config.train.updates, config.train.learning_rate, config.train.rows_per_pass) == (50, 1e-3, 32)
    assert (config.sampler.name, config.sampler.fields) == ("acme_sampler", {"num_steps": 3, "pace": 0.5})
    assert config.rewards == [RewardConfig("acme_blue", {"judge": "embedded"})]


def test_the_models_settings_for_the_algorithm_stand_above_those_for_all(load_acme: Any) -> None:
    config = load_acme(None, MODEL | {"algorithm.name": "acme-steps"})
    assert (config.train.updates, config.algorithm.fields["clip"]) == (70, 0.9)
    assert load_acme(None, MODEL).algorithm.fields["clip"] == 0.2


def test_the_run_file_stands_above_the_model_and_overrides_above_the_file(load_acme: Any) -> None:
    text = (
        '[model]\nname = "acme_model"\n[algorithm]\nname = "acme_plain"\n[train]\nupdates = 5\nlearning_rate = 2e-3\n'
    )
    config = load_acme(text, {"train.updates": 6})
    assert (config.train.updates, config.train.learning_rate) == (6, 2e-3)


def test_another_sampler_drops_the_fields_meant_for_the_first(load_acme: Any) -> None:
    config = load_acme(None, MODEL | {"sampler.name": "acme_jump"})
    assert config.sampler.fields == {"num_steps": 2, "pace": 1.0, "height": 2.0}


def test_another_sampler_keeps_what_the_user_said_of_samplers_in_general(load_acme: Any) -> None:
    text = '[model]\nname = "acme_model"\n[algorithm]\nname = "acme_plain"\n[sampler]\nnum_steps = 7\n'
    assert load_acme(text, {"sampler.name": "acme_jump"}).sampler.fields["num_steps"] == 7
    assert load_acme(text).sampler.fields == {"num_steps": 7, "pace": 0.5}


def test_another_algorithm_drops_the_fields_of_the_files_algorithm(load_acme: Any) -> None:
    text = '[model]\nname = "acme_model"\n[algorithm]\nname = "acme_plain"\nclip = 0.5\n[surrogate]\nwidth = 4\n'
    config = load_acme(text.partition("[surrogate]")[0], {"algorithm.name": "acme_steps"})
    assert config.algorithm.fields["clip"] == 0.9
    text = text.replace("acme_plain", "acme_steps")
    assert load_acme(text).surrogate.fields == {"width": 4}
    assert load_acme(text, {"algorithm.name": "acme_plain"}).surrogate is None


def test_a_reward_that_is_named_again_keeps_its_fields(load_acme: Any) -> None:
    config = load_acme(None, MODEL | {"reward": ["acme-red", {"name": "acme_blue", "weight": 2}]})
    assert config.rewards == [RewardConfig("acme_red", {}), RewardConfig("acme_blue", {"judge": "embedded"}, 2.0)]


def test_one_field_of_one_reward_can_be_set(load_acme: Any) -> None:
    config = load_acme(None, MODEL | {"reward.acme-blue.weight": 3, "reward.acme_blue.judge": "mine"})
    assert config.rewards == [RewardConfig("acme_blue", {"judge": "mine"}, 3.0)]


def test_the_surrogate_is_the_algorithms_own_unless_named(load_acme: Any) -> None:
    config = load_acme(None, MODEL | {"algorithm.name": "acme_steps", "surrogate.warmup": 4})
    assert (config.surrogate.name, config.surrogate.fields, config.surrogate.warmup) == ("acme_net", {"width": 8}, 4)
    assert load_acme(None, MODEL).surrogate is None


def test_a_hub_id_needs_no_registered_model(load_acme: Any) -> None:
    overrides = {"model.name": "acme/other", "sampler.name": "acme_sampler", "reward": ["acme_red"]}
    assert load_acme(None, overrides | {"algorithm.name": "acme_plain"}).model.name == "acme/other"


# Regularisers

STEPS = {"model.name": "acme_model", "algorithm.name": "acme_steps"}


def test_a_run_that_lists_no_regularisers_has_those_of_its_algorithm(load_acme: Any) -> None:
    assert load_acme(None, MODEL).regularisers == []
    assert load_acme(None, STEPS).regularisers == [RegulariserConfig("acme_pull", {"strength": 3.0}, 0.5)]
    assert load_acme(None, STEPS | {"regulariser": []}).regularisers == []
    assert load_acme("regulariser = []\n", STEPS).regularisers == []


def test_a_list_of_regularisers_takes_the_place_of_the_algorithms(load_acme: Any) -> None:
    text = '[[regulariser]]\nname = "acme-push"\nweight = 2\nfar = true\n'
    pushed = RegulariserConfig("acme_push", {"strength": 1.0, "far": True}, 2.0)
    assert load_acme(text, STEPS).regularisers == load_acme(text, MODEL).regularisers == [pushed]
    both = load_acme(text, STEPS | {"regulariser": ["acme_pull", "acme_push"]}).regularisers
    assert both == [RegulariserConfig("acme_pull", {"strength": 3.0}, 0.5), pushed]


def test_the_models_fields_hold_for_a_regulariser_that_anybody_lists_and_switch_none_on(load_acme: Any) -> None:
    config = load_acme(None, MODEL | {"regulariser": ["acme_pull", "acme_push"]})
    assert [r.fields["strength"] for r in config.regularisers] == [3.0, 1.0]
    assert [r.weight for r in config.regularisers] == [1.0, 1.0]
    text = '[[regulariser]]\nname = "acme_pull"\nstrength = 4\n'
    assert load_acme(text, MODEL).regularisers == [RegulariserConfig("acme_pull", {"strength": 4.0}, 1.0)]


def test_one_field_of_one_regulariser_can_be_set(load_acme: Any) -> None:
    config = load_acme(None, STEPS | {"regulariser.acme-pull.weight": 0, "regulariser.acme_pull.strength": 5})
    assert config.regularisers == [RegulariserConfig("acme_pull", {"strength": 5.0}, 0.0)]
