"""Anything that may be typed, connected or lie in a folder: a result, or one clear error, in bounded time and memory.

STORYLOOM_FUZZ=20 tries twenty times as much, with other random numbers every time, and prints how much that was.
"""

import io
import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as some
from safetensors.torch import save_file

import storyloom
from storyloom.attention.consistent import anchor_sources, consistent_self_attention, sample_tokens
from storyloom.models.demo import model as demo
from storyloom.models.pickles import expanded_size
from storyloom.models.storymaker import characters, crops
from storyloom.models.storymaker import weights as storymaker
from storyloom.pages.comic import MAX_PIXELS, PageStyle, comic_pages, parse_colour
from storyloom.pages.layout import LAYOUTS, parse_rows
from storyloom.prompts.batches import join_latents, plan_batches, split_latent
from storyloom.prompts.script import MAX_FRAMES, MAX_TEXT, StoryScriptError, parse_story
from storyloom.prompts.svr import reweight_rows
from storyloom.runtime.blocks import check_blocks, choose_blocks
from storyloom.runtime.patch import check_percents

TIMES = int(os.environ.get("STORYLOOM_FUZZ", "1"))
TRIED = Counter()
ANY = some.characters()
"""Any character, half surrogates too."""
SIGNS = some.sampled_from([*"[]#\\\n\r:,.-{}()\0\ufeff\u2028\u202e\u0301\ud800 aA1", "NC", "{prompt}", "[Fox]", "İ"])
TEXT = some.lists(some.one_of(SIGNS, ANY), max_size=60).map("".join)
FLOATS = some.floats(allow_nan=True, allow_infinity=True)


def fuzz(examples, **strategies):
    """A test of so many examples, the same ones in every run unless more are asked for."""

    def decorate(test):
        @settings(
            max_examples=examples * TIMES,
            derandomize=TIMES == 1,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(**strategies)
        @wraps(test)
        def counted(**inputs):
            TRIED[test.__name__] += 1
            test(**inputs)

        return counted

    return decorate


@pytest.fixture(scope="module", autouse=True)
def tried():
    yield
    if TIMES > 1:
        sys.stderr.write("".join(f"\n{count:8d}  {name}" for name, count in TRIED.items()) + "\n")


def clear(error, longest=1000):
    """Assert that an error is one short text."""
    text = str(error)
    assert text and "\n" not in text.strip("\n") and len(text) <= longest, text[:2000]


# ---- texts -----------------------------------------------------------------------------------------------------------


@fuzz(300, identity=TEXT, frames=TEXT, style=TEXT)
def test_a_script_is_a_story_or_an_error_with_its_box_and_line(identity, frames, style):
    try:
        story = parse_story(identity, frames, style)
    except StoryScriptError as fault:
        clear(fault)
        box = {"identity": identity, "frames": frames, "style": style}[fault.box]
        lines = box.replace("\r\n", "\n").replace("\r", "\n").count("\n") + 1
        assert fault.line is None or 1 <= fault.line <= lines
    else:
        assert story.identity and story.frames and all(frame.parts for frame in story.frames)


@pytest.mark.parametrize("piece", ["[", "[x]", "[Fox]", "\\", "a\n", "a\r", " ", "{prompt}", "漢"])
def test_a_million_characters_are_parsed_or_refused_in_a_moment(piece):
    """No limit of time is asserted: what is quadratic would take hours here."""
    text = (piece * MAX_TEXT)[:MAX_TEXT]
    for box in ({"frames": text}, {"identity": text}, {"style": text}):
        try:
            parse_story(**{"identity": "[Fox] a fox", "frames": "[Fox] sits"} | box)
        except StoryScriptError as fault:
            clear(fault)


def test_more_than_any_story_is_refused_with_what_is_possible():
    for box in ("identity", "frames", "style"):
        message = f"{box}: it is 1000001 characters long, but at most 1000000"
        with pytest.raises(StoryScriptError, match=message) as fault:
            parse_story(**{"identity": "a", "frames": "b"} | {box: "a" * (MAX_TEXT + 1)})
        assert fault.value.box == box
    assert len(parse_story("a fox", "a\n" * MAX_FRAMES).frames) == MAX_FRAMES
    with pytest.raises(StoryScriptError, match="there are 10001 frames, but at most 10000 are possible"):
        parse_story("a fox", "a\n" * (MAX_FRAMES + 1))


def test_names_that_stand_for_long_descriptions_are_bounded_as_written_out():
    """A text of 200 kB would otherwise be prompts of 5 GB."""
    with pytest.raises(StoryScriptError, match="with its descriptions inserted, the story is longer") as fault:
        parse_story("[A] " + "x" * 100_000, "[A]" * 50 + "\n" + "[A]" * 50_000)
    assert fault.value.line == 2


def test_as_many_characters_as_frames_take_no_longer_than_each_alone():
    count = 9000
    story = parse_story("\n".join(f"[A{i}] x" for i in range(count)), "\n".join(f"[A{i}] y" for i in range(count)))
    assert [frame.characters for frame in story.frames] == [(f"A{i}",) for i in range(count)]
    with pytest.raises(StoryScriptError, match="Known: .*, 8992 more, and") as fault:
        parse_story("\n".join(f"[A{i}] x" for i in range(count)), f"[{'B' * 10_000}] y")
    clear(fault.value)


DEPTHS = {("input", 4): 2, ("input", 7): 10, ("middle", 0): 10, ("output", 0): 10, ("output", 3): 2}
BLOCKS = some.one_of(
    TEXT,
    some.lists(some.sampled_from(["input", "OUTPUT", "middle", "all", " ", ",", "-", ".", "0", "7", "٣", "99999"])).map(
        "".join
    ),
)


@fuzz(200, text=BLOCKS)
def test_blocks_are_chosen_from_the_model_or_refused(text):
    try:
        check_blocks(text)
        chosen = choose_blocks(text, DEPTHS)
    except ValueError as error:
        clear(error)
        assert str(error).startswith('Blocks "')
    else:
        assert chosen and set(chosen) <= set(DEPTHS)
        assert all(set(layers or ()) <= set(range(DEPTHS[key])) for key, layers in chosen.items())


@pytest.mark.parametrize("text", ["output 0.0-99999999999", "output " + "9" * 5000, "," * 10**6, "output 1," * 10**5])
def test_a_block_string_without_end_is_refused(text):
    with pytest.raises(ValueError, match='^Blocks "') as error:
        choose_blocks(text, DEPTHS)
    clear(error.value)


@fuzz(100, text=some.one_of(TEXT, some.text("0123456789, ", max_size=30)))
def test_rows_and_colours_are_read_or_refused(text):
    for read in (parse_rows, parse_colour):
        try:
            values = read(text)
        except ValueError as error:
            clear(error)
        else:
            assert all(0 <= number <= 255 for number in values)


@fuzz(200, start=FLOATS | some.just(math.nan), end=FLOATS | some.just(math.nan))
def test_a_window_of_percents_is_open_somewhere_or_refused(start, end):
    try:
        check_percents(start, end)
    except ValueError as error:
        clear(error)
        assert not start <= end
    else:
        assert start <= end


# ---- tensors ---------------------------------------------------------------------------------------------------------


@fuzz(150, frames=some.integers(1, 3000), size=some.integers(1, 80), anchors=some.integers(0, 80))
def test_a_plan_has_every_frame_in_batches_of_one_size_or_is_refused(frames, size, anchors):
    try:
        plan = plan_batches(frames, size, anchors)
    except ValueError as error:
        clear(error)
        assert anchors >= size < frames
        return
    assert len(plan.positions()) == frames and len({len(batch) for batch in plan.batches}) == 1
    assert len(plan.batches[0]) <= size and plan.batches[0][0] == 0


LATENTS = some.tuples(some.integers(0, 5), some.integers(0, 3), some.integers(0, 3))


@fuzz(
    150,
    shape=LATENTS,
    numbers=some.none() | some.lists(some.integers(-9, 9), max_size=6),
    mask=some.none() | some.lists(some.integers(0, 5), min_size=2, max_size=4),
    size=some.integers(1, 4),
)
def test_latents_of_any_shape_are_split_and_joined_or_refused(shape, numbers, mask, size):
    latent = {"samples": torch.zeros(shape[0], 4, *shape[1:])}
    latent |= {} if numbers is None else {"batch_index": numbers}
    latent |= {} if mask is None else {"noise_mask": torch.zeros(mask)}
    assume(shape[0] > 0)
    plan = plan_batches(shape[0], size, 0)
    try:
        joined = join_latents([split_latent(latent, batch) for batch in plan.batches], plan)
    except ValueError as error:
        clear(error)
    else:
        assert joined["samples"].shape == latent["samples"].shape


@fuzz(
    100,
    images=some.integers(1, 5),
    tokens=some.integers(1, 9),
    rate=some.floats(0, 1),
    anchors=some.integers(0, 6),
    seed=some.integers(0, 2**64 - 1),
)
def test_shared_attention_keeps_its_shape_whoever_looks_at_whom(images, tokens, rate, anchors, seed):
    q, k, v = torch.randn(3, images, tokens, 4, generator=torch.Generator().manual_seed(images))
    subsets = [sample_tokens(seed, 0, image, tokens, rate) for image in range(images)]
    assert all(len(subset) == int(rate * tokens) and len(set(subset.tolist())) == len(subset) for subset in subsets)

    def attend(q, k, v, heads):
        return (q @ k.mT).softmax(-1) @ v

    out = consistent_self_attention(q, k, v, 1, subsets, anchor_sources(images, anchors), attend)
    assert out.shape == q.shape and out.isfinite().all()


@fuzz(
    100,
    rows=some.lists(some.integers(0, 6), unique=True),
    alpha=some.floats(-0.1, 1),
    beta=some.floats(0, 4),
    scale=some.sampled_from([0.0, 1e-20, 1.0, 30.0]),
    dtype=some.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_reweighting_touches_its_rows_alone_and_stays_finite(rows, alpha, beta, scale, dtype):
    hidden = (scale * torch.randn(7, 5, generator=torch.Generator().manual_seed(len(rows)))).to(dtype)
    out = reweight_rows(hidden, rows, alpha, beta)
    others = [row for row in range(7) if row not in rows]
    assert out.shape == hidden.shape and out.dtype == dtype and torch.equal(out[others], hidden[others])
    assert alpha < 0 or out.isfinite().all()


@fuzz(
    100,
    height=some.integers(1, 40),
    width=some.integers(1, 40),
    mask=some.tuples(some.integers(1, 50), some.integers(1, 50)),
    values=some.lists(some.floats(-2, 2), min_size=1, max_size=9),
    channels=some.sampled_from([3, 4]),
)
def test_any_picture_and_mask_make_a_crop_of_the_encoders_size(height, width, mask, values, channels):
    picture = crops.to_pixels(torch.tensor(values).repeat(height * width * channels)[: height * width * channels]
                              .view(height, width, channels))  # fmt: skip
    area = crops.to_mask(torch.tensor(values).repeat(mask[0] * mask[1])[: mask[0] * mask[1]].view(mask), height, width)
    assert picture.shape == (height, width, 3) and area.shape == (height, width)
    if crops.mask_box(area) is not None and min(height, width) >= 8:
        assert crops.character_crop(picture, area).shape == (crops.SIDE, crops.SIDE, 3)


# ---- pages -----------------------------------------------------------------------------------------------------------


@fuzz(
    40,
    captions=some.lists(TEXT, max_size=4),
    title=TEXT,
    layout=some.sampled_from(LAYOUTS),
    columns=some.integers(0, 20),
    gap=some.integers(0, 256),
    size=some.integers(0, 200),
    page_width=some.sampled_from([0, 1, 64, 300]),
    place=some.sampled_from(["below", "over"]),
    shape=some.tuples(some.integers(1, 30), some.integers(1, 30)),
)
def test_any_captions_and_sizes_make_pages_or_one_error(
    captions, title, layout, columns, gap, size, page_width, place, shape
):
    style = PageStyle(
        layout=layout,
        rows="2,1",
        columns=columns,
        gap=gap,
        caption_size=size,
        page_width=page_width,
        caption_place=place,
        title=title,
    )
    try:
        pages = comic_pages([np.zeros((*shape, 3), np.float32)] * 3, captions, style)
    except ValueError as error:
        clear(error)
    else:
        assert len({page.size for page in pages}) == 1


def test_pages_without_bounds_are_refused_before_they_are_made():
    panels = [np.zeros((8, 8, 3), np.float32)] * 400
    for style in (
        PageStyle(layout="column", page_width=16384),
        PageStyle(layout="grid", columns=1, panels_per_page=1, page_width=4096),
    ):
        with pytest.raises(ValueError, match="together more than 536 million: lower page_width") as error:
            comic_pages(panels, [], style)
        clear(error.value)
    assert MAX_PIXELS * 3 * 4 < 7 * 10**9, "as ComfyUI holds images"


@pytest.mark.parametrize("text", ["x ", "漢", "\u0301", "a\u200d", "א", "a\n"])
def test_a_title_and_a_caption_of_a_million_characters_are_cut(text, caplog):
    panel = np.zeros((64, 64, 3), np.float32)
    (page,) = comic_pages([panel], [text * 10**6], PageStyle(title=text * 10**6))
    assert page.width < 200 and page.height < 1000
    assert all(len(record.getMessage()) < 600 for record in caplog.records)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A character's file, a small one of weights in each format of PyTorch, and one of the demo model."""
    folder = tmp_path_factory.mktemp("files")
    features = characters.features_of(None, torch.zeros(characters.FEATURES))
    characters.save_character(
        folder / "character.safetensors", characters.CharacterReference("Fox", ((features, 1.0),), torch.zeros(8, 8, 3))
    )
    weights = {"image_proj_model": {"bg_embed": torch.ones(2, 3)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2)}}
    torch.save(weights, folder / "zip.bin")
    torch.save(weights, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    save_file({f"{part}.{name}": value for part, inside in weights.items() for name, value in inside.items()},
              folder / "weights.safetensors")  # fmt: skip
    save_file({"x": torch.ones(2)}, folder / "demo.safetensors")
    return folder


READERS = {
    "character.safetensors": (characters.load_character, characters.CharacterFileError),
    "zip.bin": (storymaker.read_checkpoint, storymaker.StoryMakerFileError),
    "legacy.bin": (storymaker.read_checkpoint, storymaker.StoryMakerFileError),
    "weights.safetensors": (storymaker.read_checkpoint, storymaker.StoryMakerFileError),
    "demo.safetensors": (demo.load_weights, ValueError),
}


@fuzz(400, data=some.data(), name=some.sampled_from(sorted(READERS)))
def test_a_damaged_file_is_read_or_refused_and_nothing_is_written(saved, data, name):
    read, refusal = READERS[name]
    content = bytearray((saved / name).read_bytes())
    match data.draw(some.sampled_from(["cut", "flip", "insert", "replace"])):
        case "cut":
            del content[data.draw(some.integers(0, len(content) - 1)) :]
        case "flip":
            for _ in range(data.draw(some.integers(1, 8))):
                # where the structure is: at the beginning, and in an archive at the end too
                place = data.draw(some.integers(0, min(len(content), 3000) - 1))
                place = place if data.draw(some.booleans()) or name != "zip.bin" else len(content) - 1 - place
                content[place] ^= 1 << data.draw(some.integers(0, 7))
        case "insert":
            place = data.draw(some.integers(0, min(len(content), 3000)))
            content[place:place] = data.draw(some.binary(max_size=20))
        case "replace":
            content[: data.draw(some.integers(0, 64))] = data.draw(some.binary(max_size=64))
    path = saved / f"damaged{Path(name).suffix}"
    path.write_bytes(content)
    before = set(saved.iterdir())
    try:
        read(path)
    except refusal as error:
        clear(error)
    finally:
        assert set(saved.iterdir()) == before


def knot(depth, kind):
    """A pickle of a few hundred bytes that is 2 ** depth things: as a dict's key, or where a tensor's name belongs."""
    tuples = b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(1, depth + 1))
    return b"\x80\x02}q\x00(" + tuples + (b"K\x01u." if kind == "key" else b"Q" + b"K\x01u.")


def pickled(kind):
    match kind:
        case "key" | "name":
            return knot(60, kind)
        case "lists":
            return b"\x80\x02" + b"]q\x00" + b"".join(
                b"]q" + bytes([i + 1]) + b"h" + bytes([i]) + b"a" + b"h" + bytes([i]) + b"a" for i in range(60)
            ) + b"."  # fmt: skip
        case "itself":
            return b"\x80\x02]q\x00h\x00a."
        case "steps":
            return b"\x80\x02" + b"]" * 400_000 + b"."


@pytest.mark.parametrize("kind", ["key", "name", "lists", "itself", "steps"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_short_file_that_is_endless_is_refused_unread(tmp_path, kind, packed):
    path = tmp_path / "mask.bin"
    content = pickled(kind)
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mask/data.pkl", content)
            archive.writestr("mask/version", "3\n")
    else:
        path.write_bytes(content)
    with pytest.raises(storymaker.StoryMakerFileError, match="contains endlessly nested objects") as error:
        storymaker.read_checkpoint(path)
    clear(error.value)


@fuzz(60, thing=some.recursive(some.integers() | some.text(max_size=5), lambda x: some.lists(x, max_size=4) |
      some.dictionaries(some.text(max_size=3), x, max_size=4) | some.tuples(x, x), max_leaves=20))  # fmt: skip
def test_things_are_counted_as_they_are(thing):
    def count(x):
        if isinstance(x, dict):
            return 1 + sum(count(k) + count(v) for k, v in x.items())
        return 1 + sum(map(count, x)) if isinstance(x, (list, tuple)) else 1

    for protocol in (2, 4):
        size = expanded_size(io.BytesIO(pickle.dumps(thing, protocol)))
        assert count(thing) <= size + 1 and size <= 3 * count(thing) + 3 and math.isfinite(size)


def test_a_pair_of_one_number_that_claims_to_be_billions_is_refused():
    one = torch.zeros(1)
    pair = {"0.to_q_lora.down.weight": one.expand(10**9, 640), "0.to_q_lora.up.weight": one.expand(640, 10**9)}
    with pytest.raises(storymaker.StoryMakerFileError, match=r"\[1000000000, 640\] instead of \[640, 640\]"):
        storymaker.load_storymaker({"ip_adapter": pair})


READ = """
import resource, sys
from pathlib import Path
import torch
from storyloom.models.storymaker import characters
from storyloom.models.storymaker import weights as storymaker
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    read = characters.load_character if "character" in name else storymaker.read_checkpoint
    try:
        read(Path(name))
    except ValueError as error:
        print(type(error).__name__)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_files_that_claim_gigabytes_take_no_memory(tmp_path):
    """A zip that unpacks to 2 GB, safetensors headers that promise more than the file or are endless, a sparse file."""
    bomb = tmp_path / "bomb.bin"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mask/data.pkl", "mask/data/0"):
            with archive.open(name, "w", force_zip64=True) as file:
                for _ in range(64 if name.endswith("0") else 1):
                    file.write(bytes(1 << 24))
    assert bomb.stat().st_size < 4 << 20
    paths = [bomb]
    for name, head in {
        "promise": (1 << 40).to_bytes(8, "little") + b"{}",
        "header": (90 << 20).to_bytes(8, "little") + b'{"' + b"a" * 100,
        "tensor": b'{"picture":{"dtype":"U8","shape":[99999,99999,3],"data_offsets":[0,29999400003]}}',
    }.items():
        path = tmp_path / f"character {name}.safetensors"
        path.write_bytes(head if name != "tensor" else len(head).to_bytes(8, "little") + head)
        paths.append(path)
    with open(tmp_path / "character sparse.safetensors", "wb") as file:
        file.truncate(8 << 30)
    paths.append(tmp_path / "character sparse.safetensors")
    done = subprocess.run([sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(storyloom.__file__).parents[1])})  # fmt: skip
    *refused, megabytes = done.stdout.split()
    assert refused == ["StoryMakerFileError", *["CharacterFileError"] * 4], done.stderr
    assert int(megabytes) < 100
