"""Recipes: the place of their settings, what they are for, and what is left of them in a resolved run file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.config.load import RunConfig, load, to_toml
from alignkit.config.recipes import departure, read_recipe
from alignkit.errors import AlignkitError, ConfigError

MODEL = {"model.name": "acme_model", "algorithm.name": "acme_steps"}
RED = {**MODEL, "reward": ["acme_red"]}
SLOW = {**RED, "recipe": "acme-slow"}
BREW = """
    from pathlib import Path

    from alignkit import hookimpl

    @hookimpl
    def register_models(register):
        register("brew_model", "brew.models:BREW", "A model with recipes")

    @hookimpl
    def register_recipes(register):
        for name in ("brew_any", "brew_red"):
            register(name, Path(__file__).parent / f"{name}.toml")
"""
MODELS = """
    from alignkit import ModelBundle

    BREW = ModelBundle(
        "brew/model",
        defaults={"sampler": {"name": "acme_sampler"}, "reward": ["acme_red"]},
        recipes={"acme_plain": "brew_any", "acme_plain/acme_red": "brew_red"},
    )
"""
ANY = '[algorithm]\nname = "acme_plain"\nclip = 0.5\n'
BREWED = {"model.name": "brew_model", "algorithm.name": "acme_plain"}


@pytest.fixture
def brew(acme: Any) -> Any:
    """The test plugin, and another one with recipes that a model takes by default."""
    files = {"brew_any.toml": ANY, "brew_red.toml": ANY.replace("0.5", "0.6")}
    acme.install("brew", BREW, files=files, models=MODELS)
    return acme


def write(folder: Path, config: RunConfig) -> Path:
    file = folder / "resolved.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    return file


def test_a_recipe_wins_over_the_model_and_the_user_over_the_recipe(load_acme: Any) -> None:
    def found(text: str | None = None, **changes: Any) -> tuple[float, int, float]:
        config = load_acme(text, {**RED, **changes})
        return config.algorithm.fields["clip"], config.train.updates, config.train.learning_rate

    assert found() == (0.8, 70, 5e-4)
    assert found(recipe="acme-slow") == (0.1, 90, 5e-4)
    assert found('recipe = "acme_slow"\n[train]\nupdates = 91\n') == (0.1, 91, 5e-4)
    assert found('recipe = "acme_slow"\n[train]\nupdates = 91\n', **{"train.updates": 92}) == (0.1, 92, 5e-4)
    assert found('recipe = "acme_slow"\n', recipe="paper") == (0.8, 70, 5e-4)


def test_a_recipe_names_the_algorithm_of_a_run_that_names_none(load_acme: Any) -> None:
    config = load_acme(None, {"model.name": "acme_model", "reward": ["acme_red"], "recipe": "acme_slow"})
    assert (config.algorithm.name, config.recipe) == ("acme_steps", "acme_slow")


def test_a_model_names_the_recipe_that_a_run_takes_by_default(brew: Any) -> None:
    def found(**changes: Any) -> tuple[float, str]:
        config = load(None, BREWED | changes, brew.registry())
        return config.algorithm.fields["clip"], config.recipe

    assert found() == (0.6, "brew_red")
    assert found(reward=["acme_blue"]) == found(reward=["acme_red", "acme_blue"]) == (0.5, "brew_any")
    assert found(recipe="brew_any") == (0.5, "brew_any")
    assert found(recipe="paper") == (0.2, "paper")
    assert found(recipe="") == (0.2, "")
    assert found(**{"algorithm.name": "acme_steps"}) == (0.2, "")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"algorithm.name": "acme_plain"}, "algorithm acme_plain"),
        ({"model.name": "acme_bare", "sampler.name": "acme_sampler"}, "model acme_bare"),
        ({"reward": ["acme_blue"]}, "acme_blue"),
        ({"reward": ["acme_red", "acme_blue"]}, "acme_red and acme_blue"),
        ({"reward": []}, "no reward"),
    ],
)
def test_a_recipe_for_another_run_is_refused_in_one_line(load_acme: Any, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_acme(None, SLOW | changes)
    assert str(caught.value) == (
        f"recipe: found acme_slow with {found}, expected algorithm acme_steps on acme_model, with acme_red as the only "
        "reward; choose another recipe (`alignkit list recipes`), or none with --recipe paper"
    )


def test_a_recipe_fits_its_model_by_hub_id_as_well(load_acme: Any) -> None:
    assert load_acme(None, SLOW | {"model.name": "acme/model"}).algorithm.fields["clip"] == 0.1


def test_an_unknown_recipe_is_answered_with_the_nearest(load_acme: Any) -> None:
    with pytest.raises(AlignkitError, match=r"unknown recipe 'acme_slwo'; did you mean acme_slow\?"):
        load_acme(None, SLOW | {"recipe": "acme_slwo"})
    with pytest.raises(ConfigError, match=r"^recipe: found 3, expected string$"):
        load_acme(None, SLOW | {"recipe": 3})


def test_the_resolved_file_holds_the_settings_and_reads_no_recipe_again(brew: Any, tmp_path: Path) -> None:
    slow, brewed = load(None, SLOW, brew.registry()), load(None, BREWED, brew.registry())
    for config, name in ((slow, "acme_slow"), (brewed, "brew_red")):
        file = write(tmp_path, config)
        assert f'recipe = "{name}"\nresolved = true\n' in file.read_text(encoding="utf-8")
        assert load(file, None, brew.registry()) == config
        brew.registry().get("recipe", name).write_text(
            f'[algorithm]\nname = "{config.algorithm.name}"\nlimit = 3\n[model]\nguidance_scale = 2.0\n',
            encoding="utf-8",
        )
        assert load(file, None, brew.registry()) == config
    brew.registry().get("recipe", "acme_slow").write_text("no longer a recipe", encoding="utf-8")
    with pytest.raises(AlignkitError):
        load(None, SLOW, brew.registry())


@pytest.mark.parametrize("recipe", ["", "paper"])
def test_a_run_without_a_recipe_stays_so_in_its_resolved_file(brew: Any, tmp_path: Path, recipe: str) -> None:
    config = load(None, BREWED | {"recipe": recipe}, brew.registry())
    assert load(write(tmp_path, config), None, brew.registry()) == config
    assert config.recipe == recipe


def test_neither_recipe_nor_algorithm_of_a_resolved_file_can_be_replaced(acme: Any, tmp_path: Path) -> None:
    file = write(tmp_path, load(None, SLOW, acme.registry()))
    assert load(file, {"recipe": "acme-slow"}, acme.registry()).recipe == "acme_slow"
    with pytest.raises(
        ConfigError, match=r"^recipe: .*resolved\.toml holds every setting already; leave the recipe out$"
    ):
        load(file, {"recipe": "paper"}, acme.registry())
    with pytest.raises(
        ConfigError, match=r"holds the settings of recipe acme_slow, which is for acme_steps; take another"
    ):
        load(file, {"algorithm.name": "acme_plain"}, acme.registry())


def test_resolved_is_true_or_false(load_acme: Any) -> None:
    with pytest.raises(ConfigError, match=r'run\.toml:2: resolved: found "yes", expected true or false$'):
        load_acme('seed = 1\nresolved = "yes"\n', MODEL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nupdates = -1\n", "4: train.updates: found -1, expected 0 or more"),
        ("clap = 3\n", "3: algorithm.clap: unknown key; did you mean clip? (`alignkit show acme_steps` lists all)"),
        ("[trian]\nupdates = 1\n", "3: trian: unknown section; did you mean train?"),
        (
            "[recipe]\nmodel = 'm'\n",
            "3: recipe: expected a table [recipe] with no other keys than models and for_reward",
        ),
        ("[recipe]\nmodels = 'm'\n", '3: recipe: found "m", expected list of string'),
        (
            "[model]\nname = 'acme_model'\n",
            "4: model.name: a recipe chooses no model; write [recipe] with models = [...]",
        ),
    ],
)
def test_a_mistake_in_a_recipe_has_its_file_and_line(acme: Any, text: str, message: str) -> None:
    path = acme.registry().get("recipe", "acme_slow")
    path.write_text(f'[algorithm]\nname = "acme_steps"\n{text}', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(None, SLOW, acme.registry())
    assert str(caught.value).startswith(f"{path}:{message}")


def test_a_recipe_has_no_keys_above_its_sections(acme: Any) -> None:
    path = acme.registry().get("recipe", "acme_slow")
    path.write_text('seed = 3\n[algorithm]\nname = "acme_steps"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r":1: seed: a recipe holds sections alone; remove this key$"):
        read_recipe(acme.registry(), "acme_slow")


def test_paths_of_a_recipe_are_relative_to_its_file(acme: Any, load_acme: Any, tmp_path: Path) -> None:
    path = acme.registry().get("recipe", "acme_slow")
    (path.parent / "net.safetensors").touch()
    path.write_text(
        '[algorithm]\nname = "acme_steps"\n[surrogate]\nname = "acme_net"\ninit = "net.safetensors"\n', encoding="utf-8"
    )
    config = load_acme("seed = 1\n", SLOW)
    assert config.surrogate is not None and config.surrogate.init == str(path.parent / "net.safetensors")
    replaced = load_acme(None, SLOW | {"surrogate.init": "mine.safetensors"})
    assert replaced.surrogate is not None and Path(replaced.surrogate.init).name == "mine.safetensors"


def test_what_is_not_the_papers_is_the_recipe_or_fields_that_say_so(plugins: Any, load_acme: Any, acme: Any) -> None:
    assert departure(load_acme(None, RED), acme.registry()) == ""
    assert departure(load_acme(None, SLOW), acme.registry()) == "recipe acme_slow, not the paper's"
    shapes = {"algorithm.name": "lasro", "model.name": "shapes_lcm"}
    assert departure(load(None, shapes | {"recipe": "paper"})) == ""
    changed = shapes | {"recipe": "paper", "algorithm.smoothing": 0.2, "algorithm.pairs": "random"}
    assert departure(load(None, changed)) == "algorithm.pairs, algorithm.smoothing, not the paper's"
