"""Plugins that tests write to a temporary folder and that are found like installed ones."""

from __future__ import annotations

import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from alignkit.config.load import RunConfig, load
from alignkit.errors import ConfigError
from alignkit.registry import GROUP, Registry, default_registry


@dataclass
class PluginFolder:
    """A folder on sys.path for test plugins."""

    path: Path
    packages: list[str] = field(default_factory=list)

    def install(
        self, package: str, init: str, version: str = "1.0", files: Mapping[str, str] | None = None, **modules: str
    ) -> None:
        """Install a distribution named after its package, with `__init__.py`, other modules, files that are none, and
        one entry point."""
        self.packages.append(package)
        folder = self.path / package
        folder.mkdir()
        for name, source in {"__init__": init, **modules}.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        info = self.path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{package} = {package}\n", encoding="utf-8")

    def install_project(self, folder: Path) -> None:
        """Install a distribution from its own folder and project file, as `pip install -e` does."""
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        entries = project["entry-points"][GROUP]
        self.packages += entries
        sys.path.insert(0, str(folder))
        info = self.path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        lines = (f"{name} = {target}\n" for name, target in entries.items())
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{''.join(lines)}", encoding="utf-8")
        about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(about, encoding="utf-8")
        default_registry.cache_clear()

    def registry(self) -> Registry:
        """Return a registry of the plugins in this folder alone."""
        found = distributions(path=[str(self.path)])
        return Registry(entry for one in found for entry in one.entry_points.select(group=GROUP))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginFolder]:
    """An empty folder for plugins, which are unloaded after the test."""
    path = tmp_path / "plugins"
    path.mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(path))
    folder = PluginFolder(path)
    default_registry.cache_clear()
    yield folder
    default_registry.cache_clear()
    for module in list(sys.modules):
        if module.partition(".")[0] in folder.packages:
            del sys.modules[module]


ACME = """
    from pathlib import Path

    from alignkit import hookimpl

    @hookimpl
    def register_algorithms(register):
        register("acme-steps", "acme.parts:Steps", "Learns with a surrogate")
        register("acme_plain", "acme.parts:Plain", "Learns without one")

    @hookimpl
    def register_rewards(register):
        register("acme_red", "acme.parts:Red", "Redness of an image")
        register("acme_blue", "acme.parts:Blue", "Blueness of an image")

    @hookimpl
    def register_samplers(register):
        register("acme_sampler", "acme.parts:Paced", "A sampler")
        register("acme_jump", "acme.parts:Jump", "A jump")

    @hookimpl
    def register_surrogates(register):
        register("acme_net", "acme.parts:Net", "A network")

    @hookimpl
    def register_regularisers(register):
        register("acme_pull", "acme.parts:Pull", "Pulls back")
        register("acme_push", "acme.parts:Push", "Pushes away")

    @hookimpl
    def register_models(register):
        register("acme_model", "acme.models:acme_model", "A model that brings settings")
        register("acme_bare", "acme.models:BARE", "A model that brings none")

    @hookimpl
    def register_policies(register):
        register("acme_formula", "acme.parts:Formula", "A policy without a checkpoint")

    @hookimpl
    def register_recipes(register):
        register("acme-slow", Path(__file__).parent / "slow.toml")

    @hookimpl
    def register_commands(register):
        register("acme-greet", "acme.commands:greet", "Greet somebody")
"""

PARTS = '''
    from __future__ import annotations

    from dataclasses import dataclass, field
    from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

    from annotated_types import Interval

    from alignkit.interfaces import Algorithm, Policy, Regulariser, Reward, Sampler, Surrogate

    if TYPE_CHECKING:
        import torch


    @dataclass
    class Plain(Algorithm):
        """Acme's plain method (Acme et al. 2026)."""

        clip: float = 0.2
        """Largest size of a step,
        in units of the ratio."""
        mode: Literal["hard", "soft"] = "hard"
        """Strictness of the answers."""
        scales: list[float] = field(default_factory=lambda: [1.0, 2.0])
        limit: Annotated[int, Interval(ge=1, le=8)] | None = None
        span: tuple[int, int] = (1, 2)
        _cache: torch.Tensor | None = field(default=None, init=False)

        def __post_init__(self):
            if self.clip <= 0:
                raise ValueError(f"clip: found {self.clip}, expected more than 0")

        def collect(self, batch, ctx): ...
        def updates(self, rows, ctx): ...
        def loss(self, rows, ctx): ...


    @dataclass
    class Steps(Plain):
        needs: ClassVar[frozenset[str]] = frozenset({"surrogate"})
        default_surrogate: ClassVar[str] = "acme_net"
        default_regularisers: ClassVar = {"acme_pull": 0.5}
        rounds: int = 3
        """Rounds of each batch."""


    class Red(Reward):
        def __call__(self, images, examples): ...


    @dataclass
    class Blue(Red):
        judge: str = "public"
        """Name of the reward model."""


    @dataclass
    class Paced(Sampler):
        pace: float = 1.0

        def grid(self, policy): ...
        def transition(self, policy, x, k, prompt): ...


    @dataclass
    class Jump(Paced):
        height: float = 2.0


    @dataclass
    class Net(Surrogate):
        width: int = 8

        def load(self, policy): ...
        def score(self, latents, prompt): ...
        def loss(self, winner, loser, prompt): ...
        def module(self): ...


    @dataclass
    class Pull(Regulariser):
        """Pulls the policy back."""

        strength: float = 1.0
        """Strength of the pull."""

        def loss(self, rows, predictions, ctx): ...


    @dataclass
    class Push(Pull):
        far: bool = False


    class Formula(Policy):
        """A closed form, which is opened by no source."""

        @classmethod
        def serves(cls, source):
            return source.startswith("formula:")

        @classmethod
        def load(cls, source, settings): ...
        def times(self): ...
        def schedule(self, t): ...
        def encode(self, texts): ...
        def encode_images(self, images): ...
        def decode(self, latents): ...
        def denoise(self, x, t, prompt, guidance_scale=None): ...
        def features(self, images): ...
        def parameters(self): ...
        def weights(self): ...
        def using(self, weights): ...
        def reference(self): ...
        def export(self, folder, weights): ...
        def read_export(self, folder): ...
'''

MODELS = """
    from alignkit.interfaces import ModelBundle

    BARE = ModelBundle(path="acme/bare")


    def acme_model():
        return ModelBundle(
            path="acme/model",
            teacher="acme/teacher",
            defaults={
                "sampler": {"name": "acme_sampler", "num_steps": 3, "pace": 0.5},
                "reward": [{"name": "acme_blue", "judge": "embedded"}],
                "train": {"updates": 50, "learning_rate": 1e-3},
                "regulariser": {"acme_pull": {"strength": 3.0}},
            },
            algorithm_defaults={
                "acme_steps": {"algorithm": {"clip": 0.9}, "train": {"updates": 70}},
                "acme_steps/acme_red": {"algorithm": {"clip": 0.8}, "train": {"learning_rate": 5e-4}},
            },
        )
"""

SLOW = """\
# Small steps, and more of them
# than Acme has.

[recipe]
models = ["acme_model"]
for_reward = "acme_red"

[algorithm]
name = "acme_steps"
clip = 0.1

[train]
updates = 90
"""

COMMANDS = '''
    from typing import Annotated

    import typer


    def greet(
        name: Annotated[str, typer.Argument(help="Who is greeted.")],
        times: Annotated[int, typer.Option(min=1, help="How often.")] = 1,
    ) -> None:
        """Greet somebody by name.

        \\b
        alignkit acme-greet Ada --times 2
        """
        for _ in range(times):
            typer.echo(f"Hello {name}")
'''


@pytest.fixture
def acme(plugins: PluginFolder) -> PluginFolder:
    """One plugin of every kind."""
    files = {"slow.toml": SLOW}
    plugins.install("acme", ACME, version="2.5", files=files, parts=PARTS, models=MODELS, commands=COMMANDS)
    return plugins


@pytest.fixture
def load_acme(acme: PluginFolder, tmp_path: Path) -> Callable[..., RunConfig]:
    """A function that loads a run file of the given text and overrides, with the test plugin alone."""

    def build(text: str | None = None, overrides: dict[str, Any] | None = None) -> RunConfig:
        if text is not None:
            (tmp_path / "run.toml").write_text(text, encoding="utf-8")
        return load(tmp_path / "run.toml" if text is not None else None, overrides, acme.registry())

    return build


def problems(load_acme: Any, text: str | None, overrides: dict[str, Any] | None = None) -> list[str]:
    """Return the lines of the error that a run file and overrides cause."""
    with pytest.raises(ConfigError) as caught:
        load_acme(text, overrides)
    return str(caught.value).splitlines()
