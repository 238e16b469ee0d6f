"""Find and refuse code that a run file alone names, and addresses of tokens.

A run file is a program: it can name code, and addresses that get a token. What the user states (on the command line, as
an override in Python) is the user's own; what a file alone states is let through where it can do no harm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from alignkit.config import ranges, schema
from alignkit.config.sections import DataConfig, PluginConfig, RunConfig
from alignkit.config.sources import LISTS
from alignkit.errors import ConfigError
from alignkit.imports import Code, Token, is_name, origin
from alignkit.registry import Registry, default_registry

OWN = "ALIGNKIT_"
"""Variables with this prefix are made for alignkit: any run file may name them."""
HOSTS = "ALIGNKIT_HOSTS"
"""The environment variable with the hosts that may get any token, separated by commas."""
OURS = "alignkit"
_REMEDY = "A run file is a program: add --trust (trust=True in Python) if you trust this one, also if it is your own"


@dataclass(frozen=True)
class Use:
    """Code that a run imports, or a token that it sends."""

    section: str
    """Section of the run file, as "reward" or "data.images"."""
    key: str
    """The setting, as on the command line."""
    value: str
    """Name of the code, or of the variable with the token."""
    url: str = ""
    """Address that the token is sent to; empty for code."""
    default: bool = False
    """Whether variable and address are those of the plugin itself."""

    def text(self) -> str:
        """Describe it in one line, with the place that code comes from."""
        if self.url:
            return f"{self.key}: sends prompts, images and the token in {self.value} to {self.url}"
        return f"{self.key}: imports {self.value} from {origin(self.value).place}"

    def refusal(self, stated: frozenset[str]) -> str:
        """Return why it is not done in a run of which the user stated these texts; empty if it may be done."""
        if not self.url:
            if self.value in stated or (found := origin(self.value)).installed:
                return ""
            return (
                f"{self.key}: the run file names {self.value}, from {found.place}, which is not part of an installed "
                f"distribution. {_REMEDY}; or name it yourself: --set {self.key}={self.value}"
            )
        host = _host(self.url)
        hosts = [one.strip() for one in os.environ.get(HOSTS, "").split(",") if one.strip()]
        own = self.default or (self.value.startswith(OWN) and not hosts)
        if own or self.url in stated or host in hosts or not os.environ.get(self.value):
            return ""
        field = self.key.rpartition(".")[0]
        return (
            f"{self.key}: the run file names {self.value}, and {self.url} to send it to. A token is sent to hosts that "
            f"you name on this machine, in {HOSTS}={host} or with --set {field}.url={self.url}; or take a variable "
            f"whose name begins with {OWN}"
        )


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def texts(tree: Any) -> Iterator[str]:
    """Yield every text in nested settings, keys left out."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from texts(value)


def uses(config: RunConfig, section: str = "", registry: Registry | None = None) -> list[Use]:
    """Return what a run imports and which tokens it sends, in one section or in all."""
    registry = registry or default_registry()
    plugins = [(at, key, one) for at, key, one in _plugins(config) if section in ("", at)]
    found = [use for at, key, one in plugins for use in _of_plugin(registry, at, key, one)]
    for name, hint in schema.field_types(DataConfig).items():
        value, at = getattr(config.data, name), f"data.{name}"
        if _marks(hint, Code) and is_name(value) and not os.path.exists(value) and section in ("", at):
            found.append(Use(at, at, value))
    return found


def _plugins(config: RunConfig) -> list[tuple[str, str, Any]]:
    """Return the section, the key and the settings of every plugin of a run."""
    plugins: list[tuple[str, str, Any]] = [("sampler", "sampler", config.sampler)]
    plugins += [("algorithm", "algorithm", config.algorithm)]
    plugins += [("surrogate", "surrogate", config.surrogate)] if config.surrogate else []
    plugins += [("reward", f"reward.{one.name}", one) for one in config.rewards]
    plugins += [("regulariser", f"regulariser.{one.name}", one) for one in config.regularisers]
    held_out = config.evaluate.held_out_rewards().items()
    plugins += [("evaluate.rewards", f"evaluate.rewards.{name}", PluginConfig(name, own)) for name, own in held_out]
    return plugins


def disclosure(config: RunConfig, registry: Registry | None = None) -> list[str]:
    """Return a line for each piece of code that a run imports beyond alignkit, and each address that it sends to."""
    registry = registry or default_registry()
    rows = [(section, registry.find(LISTS.get(section, section), one.name)) for section, _, one in _plugins(config)]
    added = [
        f"{section}: imports {row.target} of {row.distribution} {row.version}"
        for section, row in rows
        if row.distribution != OURS
    ]
    packages = {row.target.partition(".")[0] for row in registry.components() if row.distribution == OURS}
    named = [use.text() for use in uses(config, "", registry) if use.url or use.value.partition(".")[0] not in packages]
    return [*dict.fromkeys(added), *named]


def refuse(config: RunConfig, section: str = "", registry: Registry | None = None) -> None:
    """Raise ConfigError if a run file alone names code, or the address of a token, in one section or in all."""
    if config.stated is not None:
        for use in uses(config, section, registry):
            if why := use.refusal(config.stated):
                raise ConfigError(why)


def _of_plugin(registry: Registry, section: str, key: str, plugin: PluginConfig) -> Iterator[Use]:
    cls = registry.get(LISTS.get(section, section), plugin.name)
    types, defaults = schema.field_types(cls), schema.defaults(cls)
    fields = defaults | plugin.fields
    for name, hint in types.items():
        value = fields.get(name)
        if not isinstance(value, str) or not value:
            continue
        if _marks(hint, Code):
            yield Use(section, f"{key}.{name}", value)
        elif (token := _marks(hint, Token)) and re.fullmatch(r"\w+", value, re.ASCII):
            url = str(fields.get(token.url, ""))
            own = (value, url) == (defaults.get(name), defaults.get(token.url))
            yield Use(section, f"{key}.{name}", value, url, own)


def _marks(hint: Any, kind: type) -> Any:
    return next((one for one in ranges.split(hint)[1] if isinstance(one, kind)), None)
