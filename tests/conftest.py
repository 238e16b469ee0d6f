"""What many tests share: plugins made on the spot, found as any installed one is, and tiny pipelines to train."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignkit.registry import GROUP, Registry, default_registry

if TYPE_CHECKING:
    from alignkit.run import Run
    from alignkit.train import Trainer


@dataclass
class PluginFolder:
    """A folder on sys.path into which tests install plugins."""

    path: Path
    packages: list[str] = field(default_factory=list)

    def install(self, package: str, init: str, version: str = "1.0", **modules: str) -> None:
        """A distribution of the package's name with `__init__.py`, further modules and one entry point."""
        self.packages.append(package)
        folder = self.path / package
        folder.mkdir()
        for name, source in {"__init__": init, **modules}.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = self.path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{package} = {package}\n", encoding="utf-8")

    def registry(self) -> Registry:
        """A registry of what is installed here and of nothing else."""
        found = distributions(path=[str(self.path)])
        return Registry(entry for one in found for entry in one.entry_points.select(group=GROUP))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginFolder]:
    """An empty folder of plugins, forgotten behind the test."""
    path = tmp_path / "plugins"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    folder = PluginFolder(path)
    default_registry.cache_clear()
    yield folder
    default_registry.cache_clear()
    for module in list(sys.modules):
        if module.partition(".")[0] in folder.packages:
            del sys.modules[module]


ACME = """
    from alignkit import hookimpl

    @hookimpl
    def register_algorithms(register):
        register("acme-steps", "acme.parts:Steps", "Learns with a surrogate")
        register("acme_plain", "acme.parts:Plain", "Learns without one")

    @hookimpl
    def register_rewards(register):
        register("acme_red", "acme.parts:Red", "How red a picture is")
        register("acme_blue", "acme.parts:Blue", "How blue a picture is")

    @hookimpl
    def register_samplers(register):
        register("acme_walk", "acme.parts:Walk", "A walk")
        register("acme_jump", "acme.parts:Jump", "A jump")

    @hookimpl
    def register_surrogates(register):
        register("acme_net", "acme.parts:Net", "A network")

    @hookimpl
    def register_models(register):
        register("acme_model", "acme.models:acme_model", "A model that brings settings")
        register("acme_bare", "acme.models:BARE", "A model that brings none")
"""

PARTS = '''
    from __future__ import annotations

    from dataclasses import dataclass, field
    from typing import TYPE_CHECKING, ClassVar, Literal

    from alignkit.interfaces import Algorithm, Reward, Sampler, Surrogate

    if TYPE_CHECKING:
        import torch


    @dataclass
    class Plain(Algorithm):
        """Acme's plain method (Acme et al. 2026)."""

        clip: float = 0.2
        """How far a step may go,
        in units of the ratio."""
        mode: Literal["hard", "soft"] = "hard"
        """How answers are read."""
        scales: list[float] = field(default_factory=lambda: [1.0, 2.0])
        limit: int | None = None
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
        rounds: int = 3
        """Rounds of each batch."""


    class Red(Reward):
        def __call__(self, images, examples): ...


    @dataclass
    class Blue(Red):
        judge: str = "public"
        """Who judges."""


    @dataclass
    class Walk(Sampler):
        pace: float = 1.0

        def grid(self, policy): ...
        def transition(self, policy, x, k, prompt): ...


    @dataclass
    class Jump(Walk):
        height: float = 2.0


    @dataclass
    class Net(Surrogate):
        width: int = 8

        def load(self, policy): ...
        def score(self, latents, prompt): ...
        def loss(self, winner, loser, prompt): ...
        def module(self): ...
'''

MODELS = """
    from alignkit.interfaces import ModelBundle

    BARE = ModelBundle(path="acme/bare")


    def acme_model():
        return ModelBundle(
            path="acme/model",
            teacher="acme/teacher",
            defaults={
                "sampler": {"name": "acme_walk", "num_steps": 3, "pace": 0.5},
                "reward": [{"name": "acme_blue", "judge": "embedded"}],
                "train": {"updates": 50, "learning_rate": 1e-3},
            },
            algorithm_defaults={"acme_steps": {"algorithm": {"clip": 0.9}, "train": {"updates": 70}}},
        )
"""


@pytest.fixture
def acme(plugins: PluginFolder) -> PluginFolder:
    """One plugin of every kind."""
    plugins.install("acme", ACME, version="2.5", parts=PARTS, models=MODELS)
    return plugins


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

PROMPTS = ["a red circle", "a blue square and a green star", "a white ring", "a black heart", "an orange diamond"]


def _tiny_pipeline(folder: Path, kind: str) -> Path:
    """An untrained pipeline of Stable Diffusion's form for pictures of 64 pixels, saved in diffusers' format."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from alignkit_shapes.build.text import tokenizer

    torch.manual_seed(0)
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if kind == "lcm":
        pipeline, scheduler = diffusers.LatentConsistencyModelPipeline, diffusers.LCMScheduler(**schedule)
    else:
        pipeline = diffusers.StableDiffusionPipeline
        scheduler = diffusers.DDIMScheduler(**schedule, clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    text_encoder = CLIPTextModel(text)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=8, sample_size=64,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, time_cond_proj_dim=32 if kind == "lcm" else None,
    )  # fmt: skip
    pipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=words, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a StableDiffusionPipeline: predicts the noise, DDIM schedule."""
    return _tiny_pipeline(tmp_path_factory.mktemp("teacher"), "teacher")


@pytest.fixture(scope="session")
def tiny_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LatentConsistencyModelPipeline whose UNet embeds the guidance."""
    return _tiny_pipeline(tmp_path_factory.mktemp("lcm"), "lcm")


@pytest.fixture
def tiny_run(tmp_path: Path, plugins: PluginFolder, tiny_lcm: Path, tiny_teacher: Path) -> Callable[..., Run]:
    """Makes runs of seconds on the tiny pipelines, in `tmp_path / output`; the reward is a plugin of its own."""
    import alignkit

    plugins.install("brightness", BRIGHTNESS, reward=BRIGHTNESS_REWARD)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    settings: dict[str, Any] = {
        "model.name": str(tiny_lcm), "model.teacher": str(tiny_teacher), "model.lora_rank": 4,
        "sampler.name": "lcm", "sampler.num_steps": 2, "reward": ["brightness"],
        "data.prompts": str(prompts), "data.pictures": "alignkit_shapes.data:Drawings", "data.batch_size": 2,
        "algorithm.name": "lasro", "train.updates": 4, "train.rows_per_update": 4, "train.checkpoint_every": 2,
        "evaluate.prompts": str(prompts), "evaluate.limit": 2, "evaluate.steps": [1, 2], "evaluate.every": 0,
    }  # fmt: skip
    lasro = {"algorithm.samples": 3, "surrogate.warmup": 1}

    def make(output: str = "run", overrides: Mapping[str, Any] | None = None) -> Run:
        chosen = settings | {"output": str(tmp_path / output)} | dict(overrides or {})
        return alignkit.load(None, (lasro if chosen["algorithm.name"] == "lasro" else {}) | chosen)

    return make


@pytest.fixture
def make_trainer(tiny_run: Callable[..., Run]) -> Callable[..., Trainer]:
    """The built trainer of a tiny run, before its first round."""

    def make(overrides: Mapping[str, Any] | None = None) -> Trainer:
        run = tiny_run(overrides=overrides)
        trainer, _ = run._build(run._accelerator())
        return trainer

    return make


ODD_REWARDS = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("constant", "odd_rewards.rewards:Constant", "The same for every picture")
        register("unscored", "odd_rewards.rewards:Unscored", "No picture can be scored")
        register("every_second", "odd_rewards.rewards:EverySecond", "Only the first, third, ... picture can be scored")
        register("all_but_first", "odd_rewards.rewards:AllButFirst", "The first picture cannot be scored")
        register("two_of_three", "odd_rewards.rewards:TwoOfThree", "Every third picture cannot be scored")
"""

ODD_REWARD_CLASSES = """
    import torch
    from alignkit.interfaces import Reward, Scores


    class Constant(Reward):
        def __call__(self, images, examples):
            return torch.ones(len(images), dtype=torch.long)


    class Unscored(Reward):
        def valid(self, index):
            return index < 0

        def __call__(self, images, examples):
            return Scores(images.mean((1, 2, 3)), self.valid(torch.arange(len(images))))


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
    """Rewards that tell nothing apart, or cannot score some pictures."""
    plugins.install("odd_rewards", ODD_REWARDS, rewards=ODD_REWARD_CLASSES)
