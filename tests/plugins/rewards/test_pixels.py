from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.rewards.weighted import quantize
from alignkit_rewards.pixels import CLIP_MEAN, CLIP_STD, bicubic_matrix, normalize, resize, resize_and_crop


def _pillow(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC))


def _ours(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    images = torch.from_numpy(levels.copy()).permute(2, 0, 1)[None].float() / 255
    return (resize(images, height, width) * 255).round()[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("size", "target"), [(512, 384), (64, 64), (200, 480), (64, 224), (513, 224), (37, 11)])
def test_resize_equals_pillow_to_the_bit_on_noise(size: int, target: int) -> None:
    levels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(_ours(levels, target, target), _pillow(levels, target, target))


def test_resize_equals_pillow_within_a_level_off_the_square() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    np.testing.assert_allclose(_ours(levels, 64, 48), _pillow(levels, 64, 48), atol=1)


@pytest.mark.parametrize(
    ("height", "width", "target"), [(1216, 832, 1024), (1152, 896, 768), (896, 512, 768), (768, 512, 480)]
)
def test_tall_images_are_close_to_pillow_which_resizes_in_another_order(height: int, width: int, target: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = _pillow(rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8), height, width)
    for levels, most in ((smooth, 2), (noise, 25)):  # as stated in docs/rewards.md
        np.testing.assert_allclose(_ours(levels, target, target), _pillow(levels, target, target), atol=most)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (161, 97), (64, 64), (40, 30)])
def test_the_crop_is_the_centre_of_pillows_resized_image(height: int, width: int) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    shorter = min(height, width)
    long, wide = 48 * height // shorter, 48 * width // shorter
    top, left = (long - 48) // 2, (wide - 48) // 2
    expected = _pillow(levels, long, wide)[top : top + 48, left : left + 48]
    images = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255
    ours = (resize_and_crop(images, 48) * 255).round()[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, expected, atol=1)


@pytest.mark.parametrize(("size", "target"), [(96, 32), (40, 64), (50, 37)])
def test_without_levels_the_resize_is_torchs_antialiased_bicubic(size: int, target: int) -> None:
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(x, size=(target, target), mode="bicubic", antialias=True)
    torch.testing.assert_close(resize(x, target, target, levels=False), expected, atol=1e-5, rtol=0)


def test_the_gradient_of_the_resize_is_that_of_the_smooth_resize() -> None:
    x = (torch.randint(64, 192, (1, 3, 24, 24), generator=torch.Generator().manual_seed(0)) / 255).requires_grad_()
    towards = torch.randn(1, 3, 16, 10, generator=torch.Generator().manual_seed(1))
    (resize(x, 16, 10) * towards).sum().backward()
    down, across = bicubic_matrix(24, 16).float(), bicubic_matrix(24, 10).float()
    torch.testing.assert_close(x.grad, down.T @ towards @ across, atol=1e-5, rtol=1e-4)


def test_the_rows_of_the_matrix_sum_to_one() -> None:
    torch.testing.assert_close(bicubic_matrix(97, 33).sum(1), torch.ones(33, dtype=torch.float64), atol=1e-5, rtol=0)


def test_resize_of_a_quantized_image_gives_8_bit_levels() -> None:
    x = quantize(torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2)
    levels = resize(x, 33, 33) * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert levels.min() >= 0
    assert levels.max() <= 255


def test_normalize_maps_the_mean_to_zero_and_a_deviation_to_one() -> None:
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    x = torch.stack([mean, mean + std])[:, :, None, None]
    torch.testing.assert_close(normalize(x, CLIP_MEAN, CLIP_STD)[:, :, 0, 0], torch.tensor([[0.0] * 3, [1.0] * 3]))
