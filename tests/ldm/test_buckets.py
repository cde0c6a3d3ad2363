"""Buckets by aspect ratio as kohya chooses them, images resized into them, and latents of images of
any size."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from shorthand import agree, refused

from ldm.buckets import choose_bucket, read_bucketed
from ldm.generate import seeded_noise
from ldm.images import decode_images, encode_images, read_image
from ldm.vae import AutoencoderKL, VAEConfig
from planes.pictures import ImageError


@pytest.mark.parametrize(
    "image, resized, bucket",
    [
        ((959, 661), (576, 397), (576, 384)),
        ((892, 592), (579, 384), (576, 384)),
        ((1024, 768), (512, 384), (512, 384)),
        ((800, 600), (512, 384), (512, 384)),
        ((480, 360), (480, 360), (448, 320)),
        ((512, 512), (512, 512), (512, 512)),
    ],
)
def test_typical_ultrasound_frames_fall_into_kohyas_buckets(image, resized, bucket):
    assert choose_bucket(*image) == (resized, bucket)
    assert choose_bucket(*image[::-1]) == (resized[::-1], bucket[::-1])


def test_a_side_is_rounded_to_a_whole_pixel_before_it_is_cut_to_steps():
    assert choose_bucket(600, 601) == ((512, 513), (512, 512))  # of 511.6x512.4
    # of 39.5x103.7, over the area by 64 px
    assert choose_bucket(64, 168, 64, 8) == ((40, 104), (40, 104))


@pytest.mark.parametrize("size, step", [(512, 64), (128, 16), (64, 8)])
def test_a_bucket_is_in_steps_inside_the_area_and_the_image_and_keeps_the_aspect_ratio(size, step):
    draw = random.Random(size)
    for _ in range(500):
        image = width, height = draw.randint(step, 4 * size), draw.randint(step, 4 * size)
        if max(width / height, height / width) > (size / step) ** 2 / 2:
            continue  # strips alone do not fit
        resized, bucket = choose_bucket(width, height, size, step)
        assert all(side > 0 and side % step == 0 for side in bucket)
        # sides are rounded to whole pixels, then cut
        assert (bucket[0] - 1) * (bucket[1] - 1) < size * size
        for whole, shrunk, kept in zip(image, resized, bucket):
            assert kept <= shrunk <= whole and shrunk - kept < step
        if width * height <= size * size:
            assert resized == image
        else:  # one side is a multiple of the step, the other the nearest whole number to its scale
            (w, h), scales = resized, (resized[0] / width, resized[1] / height)
            on = [abs(h - height * scales[0]) < 0.51, abs(w - width * scales[1]) < 0.51]
            assert any(near for near, a, b in zip(on, resized, bucket) if a == b)


@pytest.mark.parametrize("image", [(63, 400), (400, 63), (10, 10), (20000, 100)])
def test_an_image_under_one_step_is_refused_in_one_line(tmp_path, image):
    message = f"{image[0]}x{image[1]} px: too small or narrow for 512x512 px of area in steps of 64"
    with refused(ImageError, f"^{message}"):
        choose_bucket(*image)
    Image.new("L", image).save(tmp_path / "narrow.png")
    with refused(ImageError, place=f"{tmp_path / 'narrow.png'}: {message}"):
        read_bucketed(tmp_path / "narrow.png", 512)


def noise_image(path, width, height):
    """A file of random pixels (height, width, 3), as few image processing errors survive; returns
    them in [-1, 1]."""
    pixels = torch.randint(
        256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    Image.fromarray(pixels.numpy()).save(path)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def test_an_image_within_the_area_is_cut_to_its_middle_and_not_resized(tmp_path):
    pixels = noise_image(tmp_path / "a.png", 43, 25)
    agree(read_bucketed(tmp_path / "a.png", 64, 8), pixels[:, :24, 1:41], 0)


def test_a_larger_image_shrinks_by_the_mean_of_the_area_that_each_pixel_covers(tmp_path):
    # 3x and 1.5x: each pixel is repeated until the means are over whole numbers of them
    pixels = noise_image(tmp_path / "a.png", 96, 96)
    third = pixels.unflatten(2, (32, 3)).unflatten(1, (32, 3)).mean((2, 4))
    agree(read_bucketed(tmp_path / "a.png", 32, 8), third, 1e-6)
    pixels = noise_image(tmp_path / "b.png", 96, 60)
    doubled = pixels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    shrunk = doubled.unflatten(2, (64, 3)).unflatten(1, (40, 3)).mean((2, 4))
    assert choose_bucket(96, 60, 52, 8) == ((64, 40), (64, 40))
    agree(read_bucketed(tmp_path / "b.png", 52, 8), shrunk, 1e-6)


def test_an_image_keeps_its_range_and_what_is_cut_off_after_shrinking_is_equal_on_both_sides(
    tmp_path,
):
    image = Image.new("RGB", (959, 661), "white")
    image.paste("black", (0, 0, 959, 8))  # 4.8 px of the 397, of which 6 are cut off above
    image.paste("black", (0, 650, 959, 661))  # 6.6 px below, of which 7 are
    image.save(tmp_path / "a.png")
    pixels = read_bucketed(tmp_path / "a.png", 512)
    assert pixels.shape == (3, 384, 576) and pixels.is_contiguous()
    agree(pixels, torch.ones(3, 384, 576), 1e-5)


# --- images as squares, and the latents of any ---


def test_an_image_is_read_into_a_square_whole(tmp_path):
    noise_image(tmp_path / "a.png", 90, 70)
    image = Image.open(tmp_path / "a.png")
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    pixels = (read_image(tmp_path / "a.png", 32) + 1) * 127.5
    assert np.array_equal(pixels.round().numpy(), expected)


@torch.no_grad()
def test_latents_of_images_of_several_sizes_are_each_drawn_with_the_noise_of_their_number():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    ).eval()
    images = [
        torch.rand(3, height, width) * 2 - 1 for height, width in ((16, 16), (8, 24), (16, 16))
    ]
    latents = encode_images(vae, iter(images), seed=3)
    assert [tuple(row.shape) for row in latents] == [(4, 8, 8), (4, 4, 12), (4, 8, 8)]
    for n, (image, row) in enumerate(zip(images, latents)):
        noise = seeded_noise([3_000_009 + n], row.shape)
        assert torch.equal(row, vae.to_latents(image[None], noise)[0])
        assert not torch.equal(row, vae.to_latents(image[None])[0])
        shown = vae.decode(row[None]).clamp(-1, 1)[0].permute(1, 2, 0)
        agree(decode_images(vae, row[None])[0].float(), (shown + 1) * 127.5, 0.51)
