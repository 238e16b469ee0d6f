"""Build the objects that a RunConfig names: sampler, algorithm, regularisers, rewards, prompts, model, surrogate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from alignkit import __version__
from alignkit.config.bundles import find_bundle, find_policy, is_hub_id
from alignkit.config.load import RunConfig, SurrogateConfig
from alignkit.config.recipes import departure
from alignkit.config.trust import disclosure, refuse
from alignkit.data.images import check_images, open_images
from alignkit.data.misread import misread
from alignkit.data.preferences import check_pairs, open_pairs
from alignkit.data.prompts import read_examples
from alignkit.data.sources import Images, Preferences
from alignkit.errors import ConfigError
from alignkit.interfaces import Algorithm, Policy, Regulariser, Reward, Sampler, Surrogate
from alignkit.models.encoder_cache import EncoderCache
from alignkit.records import Example, PolicyFacts, PolicySettings
from alignkit.registry import default_registry
from alignkit.rewards.cache import ScoreCache
from alignkit.rewards.checked import Scoring
from alignkit.rewards.combine import Combination
from alignkit.rewards.weighted import WeightedRewards

SURROGATE_FILE = "surrogate.safetensors"


class Parts:
    """Builder of the objects that `config` names; each call builds new ones."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def _plugin(self, kind: str, config: Any) -> Any:
        refuse(self.config, kind)
        return default_registry().get(kind, config.name)(**config.fields)

    def sampler(self, num_steps: int | None = None) -> Sampler:
        """Build the run's sampler, with another number of steps if one is given."""
        sampler: Sampler = self._plugin("sampler", self.config.sampler)
        try:
            return sampler if num_steps is None else replace(sampler, num_steps=num_steps)
        except ValueError as error:
            raise ConfigError(f"steps: {error}") from error

    def algorithm(self) -> Algorithm[Any, Any]:
        """Build the run's algorithm."""
        algorithm: Algorithm[Any, Any] = self._plugin("algorithm", self.config.algorithm)
        return algorithm

    def regularisers(self) -> list[tuple[str, float, Regulariser[Any, Any]]]:
        """Build the regularisers whose weight is not 0, as (name, weight, regulariser)."""
        return [(r.name, r.weight, self._plugin("regulariser", r)) for r in self.config.regularisers if r.weight]

    def who_needs(self, what: str) -> str:
        """Name the first that needs a teacher or images: "algorithm lasro", "regulariser lcd"; "" if nobody does."""
        if what in self.algorithm().needs:
            return f"algorithm {self.config.algorithm.name}"
        return next((f"regulariser {name}" for name, _, r in self.regularisers() if what in r.needs), "")

    def trained_rewards(self) -> list[tuple[str, float, Reward]]:
        """Build the rewards that the run lists to train on, as (name, weight, reward)."""
        return [(r.name, r.weight, self._plugin("reward", r)) for r in self.config.rewards]

    def with_measured(self, further: Sequence[str] = (), scoring: Scoring | None = None) -> WeightedRewards:
        """Build the rewards to train on and the held-out ones; all are held out where the algorithm uses no reward."""
        named, uses = self.trained_rewards(), self.algorithm().uses_rewards
        fields, kept = self.config.evaluate.held_out_rewards(), {name for name, _, _ in named}
        names = [name for name in dict.fromkeys([*fields, *further]) if name not in kept]
        refuse(self.config, "evaluate.rewards")
        held_out = [] if uses else [(name, reward) for name, _, reward in named]
        held_out += [(name, default_registry().get("reward", name)(**fields.get(name, {}))) for name in names]
        return WeightedRewards(named if uses else [], held_out, scoring, needed=uses)

    def scoring(self, cache: str | Path = "", warn: Callable[[str], None] | None = None) -> Scoring:
        """Build the settings for calling rewards from `[scoring]`; `cache` keeps scores if that names no file."""
        scoring = self.config.scoring
        path = scoring.cache or cache
        kept = ScoreCache(path) if path else None
        tries = scoring.retries, scoring.retry_seconds, scoring.retry_limit
        return Scoring(scoring.on_error, *tries, scoring.overlap, kept, warn)

    def skipped(self) -> list[str] | None:
        """Return a new list for notes on broken data if the run skips it; None if broken data ends the run."""
        return [] if self.config.data.on_error == "skip" else None

    def prompts(self, skipped: list[str] | None = None) -> list[Example]:
        """Read the texts to train on; none if there is no file and the algorithm generates no images.

        Broken entries are noted in `skipped` if that is given; else they raise ConfigError.
        """
        data = self.config.data
        algorithm = self.algorithm()
        if not data.prompts and ("pairs" in algorithm.needs or not algorithm.samples_images):
            return []
        if not data.prompts:
            raise ConfigError("data.prompts: missing; expected a .txt file with one prompt a line, or a .jsonl file")
        return read_examples(data.prompts, data.prompt_column, skipped, "data.prompts")

    def held_out(self) -> list[Example]:
        """Read the texts to evaluate on; none if there is no file."""
        return self._held_out()[: self.config.evaluate.limit]

    def point_examples(self) -> list[Example]:
        """Read the texts to measure at points of the run, from the end of the file; none without points."""
        settings = self.config.evaluate
        return self._held_out()[-settings.points_limit :] if settings.points and self.config.train.updates else []

    def _held_out(self) -> list[Example]:
        path = self.config.evaluate.prompts
        return read_examples(path, self.config.data.prompt_column, key="evaluate.prompts") if path else []

    def images(self, size: int, skipped: list[str] | None = None) -> Images | None:
        """Open the captioned images to train on, at `size` pixels; None if nobody needs any."""
        data = self.config.data
        needed = self.who_needs("images")
        refuse(self.config, "data.images")
        return open_images(data.images, size, data.caption_column, skipped) if needed else None

    def pairs(self, size: int, skipped: list[str] | None = None) -> Preferences | None:
        """Open the preference pairs to train on, at `size` pixels; None if the algorithm needs none."""
        refuse(self.config, "data.pairs")
        return open_pairs(self.config.data.pairs, size, skipped) if "pairs" in self.algorithm().needs else None

    def departure(self) -> str:
        """Return in a few words what of the run is not the paper's; empty if nothing is."""
        return departure(self.config)

    def description(self) -> str:
        """Return in one line what the run does: algorithm, model, rewards, updates, and its departure."""
        config = self.config
        rewards = " and ".join(reward.name for reward in config.rewards) or "no reward"
        what = f"{config.algorithm.name} on {config.model.name}, {rewards}, {config.train.updates} updates"
        return f"{what}; {found}" if (found := self.departure()) else what

    def metadata(self, examples: Sequence[Example]) -> dict[str, str]:
        """Return the metadata of a file of weights that were trained on `examples`."""
        config, source = self.config, find_bundle(self.config.model.name).path
        texts = "\n".join(example.text for example in examples)
        found = {
            "version": __version__,
            "base_model": source if is_hub_id(source) else config.model.name,
            "algorithm": config.algorithm.name,
            "not_in_the_paper": self.departure(),
            "rewards": ", ".join(f"{r.name} ({r.weight:g})" if r.weight != 1 else r.name for r in config.rewards),
            "seed": str(config.seed),
            "prompts_sha256": hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest() if texts else "",
        }
        return {f"alignkit.{name}": value for name, value in found.items() if value}

    def warnings(self) -> list[str]:
        """Return a line for each setting, file and prompt that is allowed and probably not meant."""
        surrogate = self.config.surrogate
        found = [self.config.evaluate.unmeasured(), surrogate.untrained() if surrogate else ""]
        return [warning for warning in [*found, *self._check_model(), *self.misread()] if warning]

    def misread(self, texts: Sequence[str] | None = None) -> list[str]:
        """Return a line about texts that the model reads in part, and one about marks of other tools in them; None: all
        prompts of the run."""
        if texts is None:
            texts = [example.text for example in [*self.prompts([]), *self.held_out(), *self.point_examples()]]
        return misread(texts, self.config.model.name, self.facts().count_tokens)

    def disclosure(self) -> list[str]:
        """Return a line for each piece of code that the run imports beyond alignkit, and each address it sends to."""
        return disclosure(self.config)

    def check(self, servers: bool = True) -> list[str]:
        """Check all that needs no weights; returns what will be skipped as broken, with its place.

        Without `servers` nothing is sent to those of rewards.
        Raises ConfigError or PluginError for the first mistake.
        """
        refuse(self.config)
        sampler, algorithm, skipped = self.sampler(), self.algorithm(), self.skipped()
        self._check_model()
        model, data, facts = self.config.model, self.config.data, self.facts()
        self._check_sampler(facts)
        for tracker in self.config.train.trackers:
            if find_spec(tracker) is None:
                raise ConfigError(f"train.trackers: {tracker} is not installed; pip install 'alignkit[{tracker}]'")
        if self.who_needs("teacher") and self.teacher_source():
            source = self.teacher_source()
            find_policy(source, model.policy, "model.teacher").check(source, self._teacher_settings())
        if "stochastic_steps" in algorithm.needs and not sampler.stochastic_steps():
            found = ", ".join(f"{name} = {value}" for name, value in self.config.sampler.fields.items())
            raise ConfigError(
                f"sampler: every step of {self.config.sampler.name} is deterministic with {found}, and algorithm "
                f"{self.config.algorithm.name} learns from the likelihood of stochastic steps; "
                "raise sampler.num_steps, or sampler.eta where there is one, or use another sampler or algorithm"
            )
        self.check_methods(facts)
        if (who := self.who_needs("teacher")) and not self.teacher_source():
            raise ConfigError(f"model.teacher: missing; {who} needs the model that {model.name} was distilled from")
        self._check_surrogate(algorithm)
        if self.config.surrogate and self.config.surrogate.init and not surrogate_file(self.config.surrogate).is_file():
            raise ConfigError(
                f"surrogate.init: there is no {surrogate_file(self.config.surrogate)}; "
                f"expected a run folder with {SURROGATE_FILE}, or such a file"
            )
        if (who := self.who_needs("images")) and not data.images:
            raise ConfigError(f"data.images: missing; {who} needs captioned images")
        if who:
            check_images(data.images, data.caption_column, skipped)
        if "pairs" in algorithm.needs and not data.pairs:
            raise ConfigError(
                f"data.pairs: missing; algorithm {self.config.algorithm.name} needs preference pairs; make them "
                "with a model and a reward (`alignkit pairs`), or choose them yourself (`alignkit prefer`)"
            )
        if "pairs" in algorithm.needs:
            check_pairs(data.pairs, skipped)
        Combination.check(
            self.config.rewards, self.config.scoring, algorithm.takes_advantages, self.config.algorithm.name
        )
        uses = algorithm.uses_rewards
        rewards = WeightedRewards(self.trained_rewards() if uses else [], needed=uses)  # held-out ones do not suffice
        if "differentiable_reward" in algorithm.needs and not rewards.differentiable:
            boxes = " and ".join(name for name, _, reward in rewards.rewards if not reward.differentiable)
            raise ConfigError(
                f"reward: algorithm {self.config.algorithm.name} follows the gradient of a reward, and {boxes} has "
                "none with these settings; use other rewards, or settings of either that need no gradient (`alignkit "
                f"show {self.config.algorithm.name}`)"
            )
        rewards.check(self.prompts(skipped), servers)
        if held_out := self.held_out():
            self.with_measured().check([*held_out, *self.point_examples()], servers)
        if self.config.train.export == "best" and self.config.train.updates and not (uses and self.point_examples()):
            raise ConfigError(
                'train.export: found "best", which compares the points of a run by the reward that it trains on; '
                'expected evaluate.points above 0, evaluate.prompts and such a reward, or use "average"'
            )
        return skipped or []

    def _check_surrogate(self, algorithm: Algorithm[Any, Any]) -> None:
        """Raise ConfigError for a surrogate that the algorithm cannot train."""
        config, wanted = self.config.surrogate, algorithm.surrogate_type
        if config is None or issubclass(default_registry().get("surrogate", config.name), wanted):
            return
        known = f"{algorithm.default_surrogate} or another" if algorithm.default_surrogate else "one"
        raise ConfigError(
            f"surrogate.name: found {config.name}, expected {known} that is derived from {wanted.__name__}, which "
            f"algorithm {self.config.algorithm.name} trains"
        )

    def check_methods(self, facts: PolicyFacts) -> None:
        """Raise ConfigError for a regulariser or an algorithm that cannot learn with this sampler and such a policy."""
        sampler = self.sampler()
        for _, _, regulariser in self.regularisers():  # first: a regulariser may reject the sampler whatever its steps
            regulariser.check(sampler, facts)
        self.algorithm().check(sampler, facts)

    def check_steps(self, steps: Sequence[int]) -> None:
        """Raise ConfigError for a number of steps that the sampler cannot take on this model. Needs no weights."""
        facts = self.facts()
        for number in steps:
            self.sampler(number).check(facts)

    def facts(self) -> PolicyFacts:
        """Return what is known of the policy before its weights load."""
        source = find_bundle(self.config.model.name).path
        return find_policy(source, self.config.model.policy).facts(source, self._settings())

    def _check_model(self) -> list[str]:
        """Return a line for each part of the model's files that is not used. Raises ConfigError for an unfit model."""
        source = find_bundle(self.config.model.name).path
        return find_policy(source, self.config.model.policy).check(source, self._settings())

    def _check_sampler(self, facts: PolicyFacts) -> None:
        """Raise ConfigError for a sampler that cannot sample from such a policy, also at the steps of evaluations."""
        sampler, name = self.sampler(), self.config.sampler.name
        if facts.consistency is False and sampler.consistency:
            raise ConfigError(
                f"sampler.name: found {name}, which is for latent consistency models, and {self.config.model.name} is "
                "none (by its scheduler or model.prediction); use renoise, which takes the same steps on other models, "
                'or set model.prediction = "consistency" to distil it into one'
            )
        for steps in (None, *self.config.evaluate.steps):
            self.sampler(steps).check(facts)

    def teacher_source(self) -> str:
        """Return folder or hub id of the teacher; empty if there is none."""
        return self.config.model.teacher or find_bundle(self.config.model.name).teacher or ""

    def encoder_cache(self) -> EncoderCache | None:
        """Return the cache of encoded texts and images that `data.cache` names; None if it names none."""
        return EncoderCache(self.config.data.cache) if self.config.data.cache else None

    def load_policy(self, device: torch.device | str = "cpu", cache: EncoderCache | None = None) -> Policy:
        """Load the model to train. `cache` keeps encoded texts and images; None: the one of `encoder_cache`."""
        source = find_bundle(self.config.model.name).path
        settings = replace(self._settings(), device=device, cache=cache or self.encoder_cache())
        policy = find_policy(source, self.config.model.policy).load(source, settings)
        self._check_sampler(facts_of(policy))
        for steps in (None, *self.config.evaluate.steps):
            self.sampler(steps).grid(policy)  # raises ConfigError where the number of times does not decide
        return policy

    def _settings(self) -> PolicySettings:
        """Return the settings of the model to train, but for device and cache."""
        model, train = self.config.model, self.config.train
        return PolicySettings(
            unet=model.unet,
            adapter=model.adapter,
            variant=model.variant,
            config=model.config,
            allow_pickle=model.allow_pickle,
            prediction=model.prediction,
            guidance_scale=model.guidance_scale,
            guidance_embedding=model.guidance_embedding,
            lora_rank=model.lora_rank,
            lora_targets=model.lora_targets,
            gradient_checkpointing=train.gradient_checkpointing,
            rows_per_pass=train.rows_per_pass,
        )

    def load_teacher(self, device: torch.device | str = "cpu") -> Policy | None:
        """Load the model that this one was distilled from, which is not trained; None if nothing needs it."""
        if not self.who_needs("teacher"):
            return None
        source, settings = self.teacher_source(), replace(self._teacher_settings(), device=device)
        return find_policy(source, self.config.model.policy, "model.teacher").load(source, settings)

    def _teacher_settings(self) -> PolicySettings:
        return PolicySettings(
            trainable=False,
            guidance_scale=1.0,
            config=self.config.model.config,
            allow_pickle=self.config.model.allow_pickle,
            gradient_checkpointing=self.config.train.gradient_checkpointing,
            rows_per_pass=self.config.train.rows_per_pass,
        )

    def load_surrogate(self, policy: Policy) -> Surrogate | None:
        """Load the surrogate for this policy, from `surrogate.init` if that is set; None if the run has none."""
        config = self.config.surrogate
        if config is None:
            return None
        surrogate: Surrogate = self._plugin("surrogate", config)
        surrogate.load(policy)
        if config.init:
            path = surrogate_file(config)
            try:
                surrogate.module().load_state_dict(load_file(path))
            except (OSError, RuntimeError, ValueError, SafetensorError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ConfigError(f"surrogate.init: {path} does not fit surrogate {config.name} ({reason})") from error
        return surrogate


def facts_of(policy: Policy) -> PolicyFacts:
    """Return the facts of a policy that is loaded, when all are known."""
    return PolicyFacts(policy.consistency, len(policy.times()))


def surrogate_file(config: SurrogateConfig) -> Path:
    """Return the file of `surrogate.init`: a run folder's exported surrogate, or the file itself."""
    path = Path(config.init)
    return path / SURROGATE_FILE if path.is_dir() else path
