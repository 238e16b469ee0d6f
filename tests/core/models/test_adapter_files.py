"""Files of adapters in the forms that other tools write, merged and compared with their formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from alignkit.models.adapters import LORA_FILE, Adapter, merge, open_adapter
from families import tiny_unet

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.1.resnets.0.conv1"
UP = "up_blocks.0.upsamplers.0.conv"
LAYERS = LINEAR, OUT, CONV, UP
Weights = dict[str, Tensor]


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet("sdxl").requires_grad_(False)


def opened(unet: UNet2DConditionModel, source: Path, **settings: bool) -> Adapter:
    """The adapter at a path, once from its header and once with weights, which say the same of layers."""
    folder, file = (source, "") if source.is_dir() else (source.parent, source.name)
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    found, known = (open_adapter(str(folder), file, shapes, weights=w, **settings) for w in (True, False))
    assert (
        found is not None and known is not None and (found.unused, [*found.layers]) == (known.unused, [*known.layers])
    )
    assert [(one.rank, one.alpha) for one in found.layers.values()] == [
        (k.rank, k.alpha) for k in known.layers.values()
    ]
    return found


def assert_merged(
    unet: UNet2DConditionModel, source: Path, expected: Callable[[str, Tensor], Tensor], *names: str
) -> None:
    """Check that exactly the weights of the layers `names` become what `expected` makes of them."""
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    merge(unet, opened(unet, source))
    after = unet.state_dict()
    assert after.keys() == before.keys() and not any(p.requires_grad for p in unet.parameters())
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        wanted = expected(layer, value) if layer in names else value
        assert torch.allclose(after[name], wanted, atol=1e-5), name
        assert layer not in names or not torch.allclose(wanted, value, atol=1e-3)


def factors(
    unet: UNet2DConditionModel, rank: int = 2, names: tuple[str, ...] = LAYERS
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer a pair (down, up) in the shapes of kohya's scripts."""
    g, found = torch.Generator().manual_seed(3), {}
    for name in names:
        out, *rest = unet.get_submodule(name).weight.shape
        up = torch.randn(out, rank, *([1, 1] if rest[1:] else []), generator=g)
        found[name] = 0.3 * torch.randn(rank, *rest, generator=g), up
    return found


def product(pair: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    return (pair[1].flatten(1) @ pair[0].flatten(1)).reshape(like.shape)


ORIGINAL = {  # as stability's code names them in a UNet with one resnet a block
    LINEAR: "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    OUT: "middle_block_1_transformer_blocks_0_attn2_to_out_0",
    CONV: "input_blocks_3_0_in_layers_2",
    UP: "output_blocks_1_2_conv",
}
KOHYA = "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"


@pytest.mark.parametrize("original", [False, True])
def test_kohyas_files_have_an_alpha_for_each_layer_and_either_names(
    unet: UNet2DConditionModel, tmp_path: Path, original: bool
) -> None:
    pairs, tensors = factors(unet), {}
    alphas = dict(zip(LAYERS, (1.0, 2.0, 5.0, 0.5), strict=True))
    for name, pair in pairs.items():
        plain = ORIGINAL[name] if original else name.replace(".", "_")
        tensors |= {key.format(plain): value for key, value in zip(KOHYA, pair, strict=True)}
        tensors[f"lora_unet_{plain}.alpha"] = torch.tensor(alphas[name])
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "style.safetensors")
    found = opened(unet, tmp_path / "style.safetensors")
    assert found.note().endswith("not used: lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight")
    assert_merged(unet, tmp_path, lambda n, w: w + alphas[n] / 2 * product(pairs[n], w), *LAYERS)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
        ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
        ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    ],
)
def test_without_any_alpha_the_product_is_added_as_it_is(
    unet: UNet2DConditionModel, tmp_path: Path, down: str, up: str
) -> None:
    pairs = factors(unet)
    tensors = {down.format(name): pair[0] for name, pair in pairs.items()}
    save_file(tensors | {up.format(name): pair[1] for name, pair in pairs.items()}, tmp_path / LORA_FILE)
    save_file({"other": torch.zeros(1)}, tmp_path / "surrogate.safetensors")  # as in a run folder
    assert_merged(unet, tmp_path, lambda n, w: w + product(pairs[n], w), *LAYERS)


def test_the_first_diffusers_files_name_processors(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    pairs, tensors = factors(unet, names=(LINEAR, OUT)), {}
    for name, pair in pairs.items():
        layer, _, kind = name.removesuffix(".0").rpartition(".")
        for key, value in zip(("down", "up"), pair, strict=True):
            tensors[f"{layer}.processor.{kind}_lora.{key}.weight"] = value
    save_file(tensors, tmp_path / "old.safetensors")
    assert_merged(unet, tmp_path, lambda n, w: w + product(pairs[n], w), LINEAR, OUT)


def test_ranks_and_alphas_that_differ_by_layer_are_peft_s_or_those_in_diffusers_metadata(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    pairs = factors(unet, 2, (LINEAR, CONV)) | factors(unet, 4, (OUT,))
    settings = {"r": 2, "lora_alpha": 3, "rank_pattern": {"to_out.0": 4}, "alpha_pattern": {"attn2.to_out.0": 8}}
    scales = {LINEAR: 3 / 2, CONV: 3 / 2, OUT: 8 / 4}
    for folder in (tmp_path / "peft", tmp_path / "root", tmp_path / "diffusers"):
        folder.mkdir()
        peft = folder.name != "diffusers"
        prefix, file = ("base_model.model.", "adapter_model.safetensors") if peft else ("unet.", LORA_FILE)
        tensors = {f"{prefix}{n}.lora_{k}.weight": t for n, p in pairs.items() for k, t in zip("AB", p, strict=True)}
        flat = json.dumps({f"unet.{name}": value for name, value in settings.items()})
        save_file(tensors, folder / file, {} if peft else {"lora_adapter_metadata": flat})
        if peft:
            own = {"peft_type": "LORA", "use_rslora": folder.name == "root", **settings}
            (folder / "adapter_config.json").write_text(json.dumps(own))
        rank = {name: len(pair[0]) for name, pair in pairs.items()}
        root = {name: rank[name] ** (folder.name == "root" and 0.5) for name in scales}
        changed = tiny_unet("sdxl")
        assert_merged(changed, folder, lambda n, w, r=root: w + r[n] * scales[n] * product(pairs[n], w), *pairs)  # type: ignore[misc]


def test_dora_scales_the_rows_of_the_sum(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    pairs, tensors, sizes = factors(unet), {}, {}
    for name, pair in pairs.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        sizes[name] = 1 + torch.rand(len(pair[1]), 1)
        tensors |= {
            f"{key}.lora_down.weight": pair[0],
            f"{key}.lora_up.weight": pair[1],
            f"{key}.alpha": torch.tensor(1.0),
        }
        tensors[f"{key}.dora_scale"] = sizes[name].reshape(-1, *[1] * (pair[0].dim() - 1))
    save_file(tensors, tmp_path / "dora.safetensors")

    def expected(name: str, weight: Tensor) -> Tensor:
        total = (weight + product(pairs[name], weight) / 2).flatten(1)
        return (sizes[name] * total / total.norm(dim=1, keepdim=True)).reshape(weight.shape)

    assert_merged(unet, tmp_path, expected, *LAYERS)
    down = next(key for key in tensors if key.endswith("to_q.dora_scale"))
    save_file(tensors | {down: tensors[down].reshape(1, -1)}, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match=f"1 layers of the UNet have other shapes: {LINEAR}"):
        opened(unet, tmp_path)


def test_lycoris_files_are_products_of_products_and_kronecker_products(
    unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    g = torch.Generator().manual_seed(5)
    tensors: Weights = {}

    def put(layer: str, **parts: Tensor) -> None:
        tensors.update({f"lora_unet_{layer.replace('.', '_')}.{part}": value for part, value in parts.items()})

    def random(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=g)

    shapes = {name: unet.get_submodule(name).weight.shape for name in LAYERS}
    (out, inner), (wide, many, *kernel) = shapes[LINEAR], shapes[CONV]
    a, b, c, d = random(out, 3), random(3, inner), random(out, 3), random(3, inner)
    put(LINEAR, hada_w1_a=a, hada_w1_b=b, hada_w2_a=c, hada_w2_b=d, alpha=torch.tensor(6.0))
    core, e, f = random(2, 2, *kernel), random(2, wide // 4), random(2, many // 2)
    left = random(4, 2)
    put(CONV, lokr_w1=left, lokr_t2=core, lokr_w2_a=e, lokr_w2_b=f, alpha=torch.tensor(1.0))
    right, both = random(4, shapes[OUT][1] // 2), random(shapes[OUT][0] // 4, 2)
    put(OUT, lokr_w1=both, lokr_w2=right, alpha=torch.tensor(7.0))  # whole factors: no alpha
    middle, up, down = random(2, 2, 3, 3), random(shapes[UP][0], 2, 1, 1), random(2, shapes[UP][1], 1, 1)
    put(UP, **{"lora_mid.weight": middle, "lora_up.weight": up, "lora_down.weight": down})
    deltas = {
        LINEAR: 2 * (a @ b) * (c @ d),
        CONV: 0.5 * torch.einsum("pq,rskl,ro,si->poqikl", left, core, e, f).reshape(wide, many, *kernel),
        OUT: torch.kron(both, right),
        UP: torch.einsum("or,rskl,si->oikl", up.flatten(1), middle, down.flatten(1)),
    }
    save_file(tensors, tmp_path / "lycoris.safetensors")
    assert_merged(unet, tmp_path, lambda n, w: w + deltas[n].reshape(w.shape), *LAYERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k.replace("down_blocks", "down_blockz"): v for k, v in t.items()},
            r"4 of 8 tensors are for layers that the UNet does not have: unet\.down_blockz\.1\.attentions",
        ),
        (lambda t: {k: v for k, v in t.items() if "to_q.lora_B" not in k}, "to_q .* where lora_B is missing"),
        (lambda t: t | {f"unet.{LINEAR}.lora_A.weight": torch.zeros(2, 5)}, r"to_q \(32, 32\) from lora_A \(2, 5\)"),
        (lambda t: t | {f"unet.{LINEAR}.diff": torch.zeros(32, 32)}, r"of a kind that is not read here: .*to_q\.diff"),
        (lambda t: {"text_encoder.a.lora_A.weight": torch.zeros(2, 5)}, "it names no layer of the UNet"),
    ],
)
def test_an_adapter_that_fits_in_part_is_refused_with_its_keys(
    unet: UNet2DConditionModel, tmp_path: Path, change: Callable[[Weights], Weights], message: str
) -> None:
    tensors = {f"unet.{n}.lora_{k}.weight": t for n, p in factors(unet).items() for k, t in zip("AB", p, strict=True)}
    save_file(change(tensors), tmp_path / LORA_FILE)
    before = unet.state_dict()
    shapes = {name: tuple(value.shape) for name, value in before.items()}
    for weights in (True, False):
        with pytest.raises(ValueError, match=message) as caught:
            open_adapter(str(tmp_path), "", shapes, weights=weights)
        assert "\n" not in str(caught.value)


def test_pickled_adapters_take_a_word_and_hold_tensors_alone(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    pairs = factors(unet)
    tensors = {f"unet.{n}.lora_{k}.weight": t for n, p in pairs.items() for k, t in zip("AB", p, strict=True)}
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(
        ValueError, match=r"it holds pytorch_lora_weights\.bin, and these are pickled; set model\.allow"
    ):
        opened(unet, tmp_path)
    merge(unet, opened(unet, tmp_path, allow_pickle=True))
    weight = tiny_unet("sdxl").get_submodule(LINEAR).weight
    assert torch.allclose(unet.get_submodule(LINEAR).weight, weight + product(pairs[LINEAR], weight), atol=1e-5)
    torch.save({"a": Path}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="cannot be unpickled as tensors"):
        opened(unet, tmp_path, allow_pickle=True)


def test_of_several_files_one_must_be_named(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"it holds a\.safetensors, b\.safetensors; name one of these files"):
        opened(unet, tmp_path)
