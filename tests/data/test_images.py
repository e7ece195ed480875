"""Every kind of picture file ends as the RGB pixels it shows, or in an error that names it."""

import base64
import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dmllm.data.images import cut_tiles, load_image
from dmllm.tiling import TilingConfig, plan


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_path_bytes_data_url_pil_and_stored_features_give_the_same_pixels(tmp_path):
    image = Image.effect_noise((5, 3), 90).convert("RGB")
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, bytearray(data), url, image, {"bytes": data, "path": None}):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(image))


def test_grey_palette_one_bit_cmyk_and_alpha_become_rgb_as_shown():
    assert load_image(encoded(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (2, 2), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert load_image(encoded(palette)).getpixel((0, 0)) == (10, 200, 30)
    assert load_image(encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "TIFF")).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("LA", (2, 2), (0, 128)))).getpixel((0, 0)) == (127, 127, 127)
    keyed = encoded(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9))
    assert load_image(keyed).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_to_eight():
    pixels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    found = np.asarray(load_image(encoded(Image.fromarray(pixels))))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_fixed_range_are_refused():
    with pytest.raises(ValueError, match="floating-point pixels"):
        load_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))
    with pytest.raises(ValueError, match=r"outside 0\.\.65535"):
        load_image(Image.new("I", (2, 2), 70000))


def test_pictures_are_turned_as_their_exif_says_and_damaged_exif_is_ignored():
    image = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    assert load_image(encoded(image, "JPEG", exif=exif)).size == (4, 8)
    assert load_image(encoded(image, "JPEG", exif=b"Exif\x00\x00garbage")).size == (8, 4)


def test_one_pixel_and_a_thin_line_can_be_cut():
    for size in ((1, 1), (1, 500), (500, 1)):
        image = load_image(encoded(Image.new("RGB", size, (1, 2, 3))))
        for mode in ("resize", "pad"):
            config = TilingConfig(mode=mode, tile_size=(6, 4), grid=(1, 1))
            assert cut_tiles(image, plan(*image.size, config), config).shape == (1, 3, 6, 4)


def test_truncated_empty_and_foreign_files_are_refused_by_name(tmp_path):
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"))
    jpeg = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    for name, content in (
        ("cut.png", data[: len(data) // 2]),
        ("cut.jpg", jpeg[:400]),
        ("no.png", b"hello"),
        ("e.png", b""),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: not a readable image"):
            load_image(path)
    with pytest.raises(ValueError, match=r"gone\.png: there is no such file"):
        load_image(tmp_path / "gone.png")


def test_too_many_pixels_are_refused_before_they_are_decoded():
    # The header promises 50000x50000; there is nothing behind it to decode.
    header = encoded(Image.new("1", (1, 1)))
    bomb = header[:16] + (9000).to_bytes(4, "big") + (9000).to_bytes(4, "big") + header[24:]
    with pytest.raises(ValueError, match="more than the allowed 1000000"):
        load_image(_with_crc(bomb), max_pixels=1_000_000)
    huge = header[:16] + (50000).to_bytes(4, "big") + (50000).to_bytes(4, "big") + header[24:]
    with pytest.raises(ValueError, match="decompression bomb"):
        load_image(_with_crc(huge))
    with pytest.raises(ValueError, match="3x3 pixels are more than the allowed 8"):
        load_image(Image.new("RGB", (3, 3)), max_pixels=8)


def _with_crc(png):
    return png[:29] + zlib.crc32(png[12:29]).to_bytes(4, "big") + png[33:]


def test_web_addresses_damaged_data_urls_and_other_things_are_refused():
    for source, said in (
        ("https://example.com/a.png", "not fetched"),
        ("data:image/png;base64,@@@", "base64 text is damaged"),
        ("data:image/png,abc", "only base64 data URLs"),
        (3.5, "not float"),
        (None, "not NoneType"),
    ):
        with pytest.raises(ValueError, match=said):
            load_image(source)


def test_the_callers_picture_is_not_changed():
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    load_image(image)
    assert image.mode == "RGBA"


def test_tiles_are_cut_row_by_row_behind_the_base_tile():
    quarters = np.zeros((8, 8, 3), dtype=np.uint8)
    quarters[:4, 4:], quarters[4:, :4], quarters[4:, 4:] = 50, 100, 150
    config = TilingConfig(mode="anyres", tile_size=(4, 4), grid=(2, 2), pinpoints=((8, 8),))
    tiles = cut_tiles(Image.fromarray(quarters), plan(8, 8, config), config)
    assert tiles.shape == (5, 3, 4, 4)
    assert tiles.dtype == torch.uint8
    assert [int(tile.unique()) for tile in tiles[1:]] == [0, 50, 100, 150]


def test_padding_is_grey_for_pad_and_black_for_tiles_unless_a_fill_is_given():
    white = Image.new("RGB", (8, 4), "white")
    pad = TilingConfig(mode="pad", tile_size=(8, 8), grid=(2, 2))
    assert cut_tiles(white, plan(8, 4, pad), pad)[0, 0, :, 0].tolist() == [127, 127, 255, 255, 255, 255, 127, 127]
    tiled = TilingConfig(mode="anyres", tile_size=(8, 8), grid=(2, 2), pinpoints=((8, 8),))
    assert cut_tiles(white, plan(8, 4, tiled), tiled)[1, 0, :, 0].tolist() == [0, 0, 255, 255, 255, 255, 0, 0]
    red = TilingConfig(mode="pad", tile_size=(8, 8), grid=(2, 2), fill=(9, 8, 7))
    assert cut_tiles(white, plan(8, 4, red), red)[0, :, 0, 0].tolist() == [9, 8, 7]
