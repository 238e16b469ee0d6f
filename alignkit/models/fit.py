"""Check the configs of a pipeline before its weights load: whether scheduler, UNet, VAE, text encoders and tokenizers
are of the kinds that the policy here runs, and fit each other."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from alignkit.config.bundles import read_index
from alignkit.errors import ConfigError
from alignkit.files import read_json
from alignkit.models.quiet import errors_only
from alignkit.models.weight_files import blamed_on

PREDICTIONS = "epsilon", "v_prediction", "sample"
VAES = "AutoencoderKL", "AutoencoderTiny"
_EXTRA_CHANNELS = {
    9: "of an inpainting model",
    8: "of a model that edits images",
    7: "of a model that enlarges images",
    5: "of a model with depth maps",
}
_CONDITIONS = {"class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None}
"""Entries of a UNet's config for inputs that a prompt does not give, with their values where there are none."""

Config = Mapping[str, Any]


def check_configs(folder: Path, unet: Path | None = None, prediction: str = "") -> dict[str, Any]:
    """Return the UNet's config, defaults filled in, of a pipeline that the policy can run.

    `unet` is the folder of another UNet, `prediction` what the settings say of the network's output. Raises
    ConfigError, in one line, for the first part that is of another kind, does not fit the others, or cannot be read.
    """
    index, where = read_index(folder), f"model: {folder}"
    pipeline = index.get("_class_name")
    with errors_only():
        cls = getattr(diffusers, str(pipeline), None)
    if not hasattr(cls, "encode_prompt"):
        raise ConfigError(f"{where} is a {pipeline}, expected a text-to-image pipeline of diffusers")
    check_scheduler(
        where, index["scheduler"][1], read_config(folder / "scheduler", "scheduler_config.json"), prediction
    )
    if unet is None:
        kind, config, unet_where = index["unet"][1], read_config(folder / "unet"), f"{where}: unet"
    else:
        config, unet_where = read_config(unet, key="model.unet"), f"model.unet: {unet}"
        kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ConfigError(f"{unet_where} is a {kind}, expected a UNet2DConditionModel")
    config = {**_defaults(UNet2DConditionModel), **config}
    _check_unet(unet_where, config, _check_vae(where, index["vae"][1], read_config(folder / "vae")))
    _check_texts(where, unet_where, config, folder, index)
    return config


def check_scheduler(where: str, name: str, config: Config, prediction: str = "") -> None:
    """Raise ConfigError for a scheduler whose noise levels are not those of betas, or with another prediction type."""
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise ConfigError(f"{where}: scheduler {name} is none of diffusers'")
    if needed := getattr(cls, "_backends", None):
        packages = ", ".join(one for one in needed if one != "torch")
        raise ConfigError(
            f"{where}: scheduler {name} needs {packages}; install it, or name another in model_index.json"
        )
    takes = inspect.signature(cls).parameters
    flow = config.get("use_flow_sigmas") or str(config.get("prediction_type")).startswith("flow")
    other = "snr_shift_scale" in takes or config.get("timestep_type") == "continuous"
    if flow or other or "beta_schedule" not in takes:
        how = "along a flow" if flow or "Flow" in name else "by shifted betas" if other else "without betas"
        raise ConfigError(
            f"{where}: scheduler {name} adds noise {how}, "
            "expected a model trained with betas, whose scheduler is a DDIMScheduler, EulerDiscreteScheduler, "
            "LCMScheduler or another of that kind; take such a model, or a plugin with a policy for this one"
        )
    if not prediction and config.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise ConfigError(
            f"{where}: scheduler {name} has prediction_type {config['prediction_type']!r}, expected one of "
            f"{', '.join(PREDICTIONS)}; set model.prediction if the network predicts one of these"
        )
    noise_levels(config, where)


def noise_levels(config: Config, where: str = "model") -> Tensor:
    """Return alpha^2 at each time of a scheduler's config, (T,). Raises ConfigError for betas of another kind."""
    try:
        levels: Tensor = DDPMScheduler.from_config(config).alphas_cumprod
    except (NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: the scheduler's config gives no noise levels ({reason})") from error
    if not len(levels) > 1 or not bool((levels.diff() < 0).all()):
        raise ConfigError(f"{where}: the scheduler's config gives {len(levels)} noise levels that do not rise")
    return levels


def _check_vae(where: str, name: str, config: Config) -> Config:
    if name not in VAES:
        raise ConfigError(f"{where}: vae is an {name}, expected an {' or an '.join(VAES)}")
    config = {**_defaults(getattr(diffusers, name)), **config}
    pixels = config["in_channels"], config["out_channels"]
    if pixels != (3, 3):
        raise ConfigError(f"{where}: vae reads and writes {pixels} channels of pixels, expected 3 and 3")
    mean, std, channels = config.get("latents_mean"), config.get("latents_std"), config["latent_channels"]
    for key, values in (("latents_mean", mean), ("latents_std", std)):
        if values is not None and len(values) != channels:
            raise ConfigError(f"{where}: vae has {len(values)} values of {key}, expected one for each of {channels}")
    return config


def _check_unet(where: str, config: Config, vae: Config) -> None:
    latents, found = vae["latent_channels"], config["in_channels"]
    if found != latents:
        what = f", {_EXTRA_CHANNELS[found]}" if found in _EXTRA_CHANNELS else ""
        raise ConfigError(
            f"{where} takes {found} channels{what}, expected {latents}, which the latents of the VAE have; take a "
            "text-to-image model"
        )
    if config["out_channels"] != latents:
        raise ConfigError(f"{where} returns {config['out_channels']} channels, expected {latents} as the VAE's latents")
    for key, none in _CONDITIONS.items():
        if config[key] != none:
            raise ConfigError(f"{where} has {key} = {config[key]!r}, an input beyond the prompt; expected none")
    if config["addition_embed_type"] not in (None, "text_time"):
        found = config["addition_embed_type"]
        raise ConfigError(f"{where} has addition_embed_type = {found!r}, expected none, or text_time as SDXL has it")
    if not isinstance(config["sample_size"], int) or config["sample_size"] < 1:
        raise ConfigError(f"{where} has sample_size = {config['sample_size']!r}, expected the edge of square latents")


def _check_texts(where: str, unet_where: str, unet: Config, folder: Path, index: Config) -> None:
    """Check tokenizers against text encoders, and the features of these against what the UNet reads."""
    there = [ending for ending in ("", "_2") if (index.get(f"text_encoder{ending}") or [None])[0]]
    expected = ["", "_2"] if unet["addition_embed_type"] else [""]
    if there != expected:
        raise ConfigError(
            f"{where} has the parts {', '.join(f'text_encoder{e}' for e in there) or 'of no text encoder'}, expected "
            f"{' and '.join(f'text_encoder{e}' for e in expected)} for its UNet"
        )
    encoders = []
    for ending in there:
        with blamed_on("model", str(folder / f"text_encoder{ending}"), "a text encoder"):
            encoders.append(transformers.AutoConfig.from_pretrained(folder / f"text_encoder{ending}"))
        _check_tokenizer(where, folder, index, ending, encoders[-1])
    width = sum(encoder.hidden_size for encoder in encoders)
    reads = unet["cross_attention_dim"]
    if any(one != width for one in ([reads] if isinstance(reads, int) else reads)):
        raise ConfigError(f"{unet_where} reads text features of {reads} numbers, the text encoders give {width}")
    if unet["addition_embed_type"]:
        found, pooled = unet["projection_class_embeddings_input_dim"], encoders[-1].projection_dim
        if found != 6 * unet["addition_time_embed_dim"] + pooled:
            raise ConfigError(
                f"{unet_where} takes {found} numbers with the time, expected those of six sizes and of "
                f"{pooled} pooled features, {6 * unet['addition_time_embed_dim'] + pooled}, as SDXL base has them"
            )


def _check_tokenizer(where: str, folder: Path, index: Config, ending: str, encoder: Any) -> None:
    name = f"tokenizer{ending}"
    if not (index.get(name) or [None])[0]:
        raise ConfigError(f"{where} has no {name} for its text_encoder{ending}")
    tokenizer = read_tokenizer(folder, name, index[name][1])
    words, known = max(tokenizer.get_vocab().values(), default=0) + 1, encoder.vocab_size
    if words > known:
        raise ConfigError(f"{where}: {name} makes tokens up to {words - 1}, text_encoder{ending} knows {known}")
    length, most = tokenizer.model_max_length, encoder.max_position_embeddings
    if length > most:
        given = "no model_max_length" if length > 1 << 30 else f"model_max_length {length}"
        raise ConfigError(f"{where}: {name} has {given}, text_encoder{ending} reads {most} tokens; set it to {most}")


def read_tokenizer(folder: Path, name: str, cls: str) -> Any:
    """Return a tokenizer of a pipeline. Raises ConfigError for files that are missing or cannot be read."""
    stamp = tuple(sorted((path.name, path.stat().st_mtime_ns) for path in (folder / name).glob("*")))
    if not stamp:
        raise ConfigError(f"model: there are no files in {folder / name}, expected a {cls}")
    return _read_tokenizer(str(folder / name), cls, stamp)


@functools.lru_cache(8)
def _read_tokenizer(folder: str, cls: str, stamp: tuple[Any, ...]) -> Any:
    with blamed_on("model", folder, f"a {cls}"), errors_only():
        return getattr(transformers, cls).from_pretrained(folder, local_files_only=True)


def read_config(folder: Path, name: str = "config.json", key: str = "model") -> dict[str, Any]:
    """Return the config of a part. Raises ConfigError, under `key`, for one that is missing or no JSON object."""
    try:
        config = read_json(folder / name)
    except FileNotFoundError:
        raise ConfigError(f"{key}: there is no {folder / name}, the config of a part of a diffusers model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {folder / name} is not a readable config ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{key}: {folder / name} holds a {type(config).__name__}, expected a JSON object")
    return config


def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def unet_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a UNet with this config, by name; no memory is taken."""
    return _unet_shapes(json.dumps(config, sort_keys=True))


@functools.lru_cache(8)
def _unet_shapes(config: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), blamed_on("model", "the UNet's config", "a UNet2DConditionModel"):
        network = UNet2DConditionModel.from_config(json.loads(config))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
