"""Tiles and stream rows by hand: what LLaVA's arithmetic gives, row by row."""

from dataclasses import replace

import pytest

from dmllm.tiling import TilingConfig, View, plan, select_best_resolution, unpadded
from dmllm.types import ROW_BREAK

SIGLIP = tuple((384 * down, 384 * across) for across in range(1, 7) for down in range(1, 7))
LAVIDA = ((768, 384), (384, 768), (768, 768), (384, 1152), (1152, 384))


def tiny(**options):
    return TilingConfig(**{"tile_size": (4, 4), "grid": (2, 2), **options})


def test_resize_is_one_tile_whatever_the_shape():
    config = tiny(mode="resize")
    for width, height in ((4, 4), (1, 1), (1000, 3)):
        found = plan(width, height, config)
        assert found.views == (View(size=(4, 4), canvas=(4, 4), offset=(0, 0), final=(4, 4)),)
        assert found.slots == (0, 1, 2, 3)
        assert found.num_tiles == 1


def test_pad_centres_the_image_on_a_square_of_its_longer_side():
    (view,) = plan(200, 100, tiny(mode="pad")).views
    assert view == View(size=(100, 200), canvas=(200, 200), offset=(50, 0), final=(4, 4))
    (view,) = plan(3, 8, tiny(mode="pad")).views
    assert view == View(size=(8, 3), canvas=(8, 8), offset=(0, 2), final=(4, 4))


def test_pad_for_a_tile_that_is_not_square_pads_to_its_shape():
    (view,) = plan(100, 100, tiny(mode="pad", tile_size=(4, 8))).views
    assert view == View(size=(100, 100), canvas=(100, 200), offset=(0, 50), final=(4, 8))


def test_a_line_of_pixels_is_shrunk_before_it_is_padded():
    (view,) = plan(90_000_000, 1, tiny(mode="pad")).views
    assert view == View(size=(1, 4096), canvas=(4096, 4096), offset=(2047, 0), final=(4, 4))


def test_a_single_tile_ends_in_one_row_break_if_row_breaks_are_on():
    assert plan(9, 9, tiny(mode="pad", row_break=True)).slots == (0, 1, 2, 3, ROW_BREAK)


def test_the_best_resolution_shows_most_pixels_then_wastes_fewest():
    # 1000x500 into 384x768 (h x w): scale .768 -> 768x384, nothing wasted; 768x768 shows as much and wastes half.
    assert select_best_resolution(1000, 500, LAVIDA) == (384, 768)
    # 500x1000 likewise upright.
    assert select_best_resolution(500, 1000, LAVIDA) == (768, 384)
    # 800x800 shows 768*768 pixels at 768x768, 384*384 elsewhere.
    assert select_best_resolution(800, 800, LAVIDA) == (768, 768)
    # a small picture is shown whole everywhere: the smallest canvas wastes least, the first of equals wins.
    assert select_best_resolution(10, 10, LAVIDA) == (768, 384)


def test_any_resolution_puts_the_base_tile_first_and_reads_the_tiles_row_by_row():
    # 8x4 pixels (w x h) fill the pinpoint (4, 8): tiles 1 and 2 side by side, each a 2x2 grid of slots.
    found = plan(8, 4, tiny(mode="anyres", pinpoints=((4, 8), (8, 4)), row_break=True))
    assert found.num_tiles == 3
    assert found.views[0] == View(size=(4, 4), canvas=(4, 4), offset=(0, 0), final=(4, 4))
    assert found.views[1] == View(size=(4, 8), canvas=(4, 8), offset=(0, 0), final=(4, 8))
    assert found.slots == (0, 1, 2, 3, 4, 5, 8, 9, ROW_BREAK, 6, 7, 10, 11, ROW_BREAK)


def test_any_resolution_without_row_breaks_and_two_rows_of_tiles():
    # tiles  1 2   each with slots  4 5   8 9     read as map rows
    #        3 4                    6 7  10 11 ...
    found = plan(8, 8, tiny(mode="anyres", pinpoints=((8, 8),)))
    assert found.slots == (0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11, 12, 13, 16, 17, 14, 15, 18, 19)


def test_padding_is_left_out_of_the_stream():
    # 8x4 pixels on the pinpoint (8, 8): resized to 8x4, rows 2..5 of 8; of the 4 map rows the middle two are image.
    found = plan(8, 4, tiny(mode="anyres", pinpoints=((8, 8),), row_break=True))
    assert found.views[1] == View(size=(4, 8), canvas=(8, 8), offset=(2, 0), final=(8, 8))
    assert found.slots == (0, 1, 2, 3, 6, 7, 10, 11, ROW_BREAK, 12, 13, 16, 17, ROW_BREAK)
    kept = plan(8, 4, tiny(mode="anyres", pinpoints=((8, 8),), unpad=False, row_break=True))
    assert len(kept.slots) == 4 + 4 * 5


def test_unpadded_rows_and_columns_by_hand():
    assert unpadded(2, 1, 4, 4) == (range(1, 3), range(4))  # int(1 * 4/2) = 2 rows, (4 - 2) // 2 = 1 cut on each side
    assert unpadded(1, 2, 4, 4) == (range(4), range(1, 3))
    assert unpadded(5, 4, 5, 5) == (range(5), range(5))  # 4 rows are image, (5 - 4) // 2 = 0 are cut
    assert unpadded(1000, 1, 4, 4) == (range(1, 3), range(4))  # never nothing
    # Features twice as wide as high: a square image fills a map of 4 rows and 2 columns.
    assert unpadded(7, 7, 4, 2, patch_aspect=2.0) == (range(4), range(2))


@pytest.mark.parametrize(
    ("width", "height", "grid", "pinpoints", "rows"),
    [
        # Row counts of the official code: LLaDA-V (27x27 a tile) and LaViDa (pooled to 14x14).
        (64, 40, (27, 27), SIGLIP, 1205),
        (30, 90, (27, 27), SIGLIP, 999),
        (64, 40, (14, 14), LAVIDA, 316),
        (30, 90, (14, 14), LAVIDA, 504),
        (500, 380, (14, 14), LAVIDA, 462),
    ],
)
def test_published_models_get_as_many_rows_as_their_own_code_gives(width, height, grid, pinpoints, rows):
    config = TilingConfig(mode="anyres", tile_size=(384, 384), grid=grid, pinpoints=pinpoints, row_break=True)
    assert len(plan(width, height, config).slots) == rows


def test_every_slot_is_a_row_of_an_existing_tile_and_appears_once():
    config = TilingConfig(mode="anyres", tile_size=(6, 4), grid=(3, 2), pinpoints=((6, 8), (12, 4), (12, 8), (18, 4)))
    for width in range(1, 40, 3):
        for height in range(1, 40, 3):
            found = plan(width, height, config)
            assert sorted(set(found.slots)) == sorted(found.slots)
            assert min(found.slots) >= 0
            assert max(found.slots) < found.num_tiles * config.rows_per_tile


def test_configurations_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="not a multiple of the tile size"):
        tiny(mode="anyres", pinpoints=((4, 6),))
    with pytest.raises(ValueError, match="pinpoints belong to mode='anyres'"):
        tiny(mode="anyres")
    with pytest.raises(ValueError, match="pinpoints belong to mode='anyres'"):
        tiny(mode="pad", pinpoints=((4, 4),))
    with pytest.raises(ValueError, match="use resize, pad, anyres or native"):
        tiny(mode="crop")
    with pytest.raises(ValueError, match="must be set"):
        plan(3, 3, TilingConfig())
    with pytest.raises(ValueError, match="0x3 pixels"):
        plan(0, 3, tiny())


def test_lists_from_a_file_become_the_same_configuration():
    read = TilingConfig(mode="anyres", tile_size=[4, 4], grid=[2, 2], pinpoints=[[4, 8]])
    assert read == tiny(mode="anyres", pinpoints=((4, 8),))


def test_a_map_beyond_max_tiles_takes_fewer_rows_in_the_place_of_its_first_tiles():
    config = TilingConfig(mode="anyres", tile_size=(56, 56), grid=(4, 4), pinpoints=((168, 168),), max_tiles=2)
    cut = plan(300, 300, config)
    assert cut.resize is not None
    assert (cut.resize.height, cut.resize.width) == (5, 5)  # 12 x 12 over sqrt(144 / 32) = 2.1
    assert cut.slots == (*range(16), *range(16, 16 + 25))
    assert plan(300, 300, replace(config, max_tiles=8)).resize is None  # 144 is below 1.1^2 * 128


def test_several_images_are_padded_only_where_that_is_said():
    config = TilingConfig(mode="anyres", tile_size=(56, 56), grid=(4, 4), pinpoints=((168, 168),), several="pad")
    assert config.of(1) is config
    assert (config.of(2).mode, plan(300, 200, config.of(2)).num_tiles) == ("pad", 1)
    assert replace(config, several="same").of(2).mode == "anyres"
