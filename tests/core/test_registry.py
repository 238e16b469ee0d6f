from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from alignkit.errors import AlignkitError, PluginError
from alignkit.interfaces import ModelBundle, Sampler
from alignkit.registry import KINDS, default_registry, normalise

HEAVY = "torch", "diffusers", "transformers", "numpy", "peft", "accelerate", "PIL"

REWARD = """
from alignkit import hookimpl

@hookimpl
def register_rewards(register):
    register("{name}", "{target}", "help")
"""

RECIPE = """
from pathlib import Path
from alignkit import hookimpl

@hookimpl
def register_recipes(register):
    path = Path(__file__).with_name("{name}.toml")
    path.write_text({text!r})
    register("{name}", path)
"""


def test_every_kind_of_component_is_listed_with_its_origin(acme: Any) -> None:
    rows = acme.registry().components()
    assert {row.kind for row in rows} == set(KINDS)
    row = acme.registry().find("algorithm", "acme_steps")
    assert (row.help, row.target, row.distribution, row.version) == (
        "Learns with a surrogate",
        "acme.parts:Steps",
        "acme",
        "2.5",
    )


def test_listing_imports_no_class(acme: Any) -> None:
    acme.registry().components()
    assert "acme" in sys.modules and "acme.parts" not in sys.modules


def test_a_dash_in_a_name_is_an_underscore(acme: Any) -> None:
    registry = acme.registry()
    assert registry.get("algorithm", "acme-steps") is registry.get("algorithm", "acme_steps")
    assert normalise("a-b_c") == "a_b_c"


def test_a_name_resolves_to_its_class(acme: Any) -> None:
    assert issubclass(acme.registry().get("sampler", "acme_sampler"), Sampler)


@pytest.mark.parametrize(("name", "path"), [("acme_model", "acme/model"), ("acme_bare", "acme/bare")])
def test_a_model_is_a_bundle_or_a_function_that_returns_one(acme: Any, name: str, path: str) -> None:
    bundle = acme.registry().get("model", name)
    assert isinstance(bundle, ModelBundle) and bundle.path == path


def test_a_recipe_is_a_file_whose_help_is_its_algorithm_and_its_first_comment(acme: Any) -> None:
    row = acme.registry().find("recipe", "acme-slow")
    assert row.help == "acme_steps: Small steps, and more of them"
    assert acme.registry().get("recipe", "acme_slow").name == "slow.toml"
    with pytest.raises(AlignkitError, match=r"unknown recipe 'acme_slo'; did you mean acme_slow\?"):
        acme.registry().get("recipe", "acme_slo")


def test_an_unknown_name_is_refused_with_the_nearest_and_the_command_that_lists_all(acme: Any) -> None:
    with pytest.raises(
        AlignkitError, match=r"unknown reward 'acme_rde'; did you mean acme_red\? \(`alignkit list rewards`"
    ):
        acme.registry().get("reward", "acme_rde")


def test_a_name_of_another_kind_is_reported_as_such(acme: Any) -> None:
    with pytest.raises(AlignkitError, match="there is a sampler of this name"):
        acme.registry().get("reward", "acme_sampler")


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        (RECIPE.format(name="paper", text="[algorithm]\nname = 'a'"), "this name stands for no recipe"),
        (RECIPE.format(name="odd", text="[train]\nupdates = 1"), "odd.toml names no algorithm"),
        (RECIPE.format(name="odd", text="[train"), "TOMLDecodeError"),
        ("import a_module_that_is_missing", "ModuleNotFoundError: No module named 'a_module_that_is_missing'"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (REWARD.format(name="Bad Name", target="a:B"), "not snake_case"),
        (REWARD.format(name="bad", target="a.B"), 'expected "module:Attribute"'),
        ("from alignkit import hookimpl\n@hookimpl\ndef register_rewards(register): 1 / 0", "ZeroDivisionError"),
        (
            "from alignkit import hookimpl\n@hookimpl\ndef register_reward(register): ...",
            "unknown hook 'register_reward'",
        ),
    ],
)
def test_a_broken_plugin_is_a_row_with_its_reason_and_the_others_work(acme: Any, init: str, reason: str) -> None:
    acme.install("shaky", init)
    registry = acme.registry()
    (row,) = [row for row in registry.components("sampler") if row.broken]
    assert (row.kind, row.name, row.distribution) == ("plugin", "shaky", "shaky")
    assert reason in row.broken and "\n" not in row.broken
    assert registry.get("sampler", "acme_sampler")
    with pytest.raises(AlignkitError, match=r"plugin shaky of shaky 1\.0 is broken"):
        registry.get("reward", "nothing_like_it")


def test_a_name_clash_names_both_plugins_and_the_remedy(acme: Any) -> None:
    acme.install("rival", REWARD.format(name="acme-red", target="rival:Red"), version="0.3")
    with pytest.raises(PluginError) as caught:
        acme.registry()
    for part in ("reward acme_red", "acme of acme 2.5", "rival of rival 0.3", "ALIGNKIT_DISABLE_PLUGINS=rival"):
        assert part in str(caught.value)


def test_a_disabled_plugin_is_not_even_imported(acme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    acme.install("rival", REWARD.format(name="acme_red", target="rival:Red"))
    monkeypatch.setenv("ALIGNKIT_DISABLE_PLUGINS", "other, rival")
    assert default_registry().find("reward", "acme_red").plugin == "acme"
    assert "rival" not in sys.modules


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("wrong.gone:Red", "cannot be imported: ModuleNotFoundError"),
        ("wrong:Gone", "cannot be imported: AttributeError"),
        ("wrong:Number", "is not an alignkit.interfaces.Reward"),
        ("wrong:Half", "does not implement __call__"),
    ],
)
def test_a_wrong_target_is_reported_with_its_plugin(plugins: Any, target: str, reason: str) -> None:
    classes = "\nfrom alignkit.interfaces import Reward\nNumber = 3\nclass Half(Reward): ...\n"
    plugins.install("wrong", REWARD.format(name="wrong", target=target) + classes)
    with pytest.raises(PluginError, match=rf"reward wrong \({target}, plugin wrong of wrong 1.0\) {reason}"):
        plugins.registry().get("reward", "wrong")


def test_listing_the_components_imports_nothing_heavy() -> None:
    code = (
        "import sys; from alignkit.registry import default_registry; rows = default_registry().components();"
        f"print(len(rows), [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, _, heavy = result.stdout.partition(" ")
    assert int(count) > 0 and heavy.strip() == "[]"


def test_no_installed_plugin_is_broken() -> None:
    default_registry.cache_clear()
    assert [row for row in default_registry().components() if row.broken] == []
