"""Tables of many tensors and files that cannot be right: each is refused when it is opened, in words that name the part."""
import os

import pytest
import torch
from checkpoint_cases import QWEN, check, edit_index, qwen, replace
from safetensors.torch import load_file, save_file

from engram_kernels import RowTable

pytestmark = pytest.mark.usefixtures("compiled")
INDEX, POINTER = "model.safetensors.index.json", "version https://git-lfs.github.com/spec/v1\n"
BF16 = torch.zeros(5, 16).bfloat16()
REFUSED = {
    "no_such_part_in_the_index": (lambda f: edit_index(f, lambda w: w.pop(QWEN.format(3))), ValueError, r"no tensor of \S+ is "
                                  r"called '.*shard_\{\}.weight' with 3 for \{\}: there are 11, the last is 11"),
    "last_part_not_in_the_index": (lambda f: edit_index(f, lambda w: w.pop(QWEN.format(11))), ValueError,
                                   r"model-\S+ holds '.*shard_11.weight', which the index does not name"),
    "part_not_in_its_file": (lambda f: replace(f, 4, None), ValueError, r"model-\S+: it has no tensor '.*shard_4.weight'"),
    "part_of_another_dtype": (lambda f: replace(f, 4, BF16.half()), ValueError,
                              r"part 4, '.*shard_4.weight' in model-\S+ is F16 \[5, 16\], expected BF16 \[rows, 16\] like "),
    "part_of_another_width": (lambda f: replace(f, 0, BF16[:, :8].clone()), ValueError,
                              r"part 1, .* is BF16 \[5, 16\], expected BF16 \[rows, 8\] like part 0"),
    "part_of_one_dimension": (lambda f: replace(f, 2, BF16[0].clone()), ValueError, r"part 2, .* is BF16 \[16\], expected BF16"),
    "part_of_no_dimension": (lambda f: replace(f, 2, BF16[0, 0].clone()), ValueError, r"part 2, .* is BF16 \[\], expected BF16"),
    "file_not_there": (lambda f: edit_index(f, lambda w: w.update({QWEN.format(1): "gone.safetensors"})), FileNotFoundError,
                       r"No such file or directory.*gone.safetensors"),
    "file_is_a_folder": (lambda f: ((f / "sub").mkdir(), edit_index(f, lambda w: w.update({QWEN.format(1): "sub"}))), ValueError,
                         "sub is no regular file"),
    "file_above": (lambda f: edit_index(f, lambda w: w.update({QWEN.format(1): "../x.safetensors"})), ValueError,
                   r"index.json says that tensor '.*shard_1.weight' lies in '../x.safetensors', expected the name of a file"),
    "file_by_root": (lambda f: edit_index(f, lambda w: w.update({QWEN.format(1): "/etc/passwd"})), ValueError, "lies in '/etc"),
    "file_of_no_name": (lambda f: edit_index(f, lambda w: w.update({QWEN.format(1): ""})), ValueError, "lies in ''"),
    "file_of_a_zero_byte": (lambda f: edit_index(f, lambda w: w.update({QWEN.format(1): "a\0b"})), ValueError, r"lies in 'a\\x0"),
    "file_is_a_number": (lambda f: edit_index(f, lambda w: w.update({QWEN.format(1): 7})), ValueError, "lies in 7, expected"),
    "part_twice": (lambda f: edit_index(f, lambda w: w.update({QWEN.format("01"): w[QWEN.format(1)]})), ValueError,
                   r"shard_1.weight' are both part 1 of|shard_01.weight' are both part 1 of"),
    "part_in_two_files": (lambda f: save_file(
        {QWEN.format(6): BF16, **load_file(f / "model-00001-of-00005.safetensors")}, f / "model-00001-of-00005.safetensors"),
        ValueError, r"model-00001-of-00005.safetensors holds '.*shard_6.weight', which the index names in another file"),
    "file_cut_short": (lambda f: os.truncate(f / "model-00001-of-00005.safetensors", 300), ValueError,
                       r"model-00001-of-00005.safetensors is no whole safetensors file"),
    "file_is_a_pointer": (lambda f: (f / "model-00002-of-00005.safetensors").write_text(POINTER),
                          ValueError, "model-00002-of-00005.safetensors is no whole safetensors file: it is a Git LFS pointer"),
    "index_is_a_pointer": (lambda f: (f / INDEX).write_text(POINTER),
                           ValueError, "index.json is no index of a checkpoint: it is a Git LFS pointer"),
    "index_is_a_list": (lambda f: (f / INDEX).write_text("[1]"), ValueError, "it has no weight_map"),
    "index_has_no_map": (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), ValueError, "no weight_map"),
    "index_is_cut": (lambda f: os.truncate(f / INDEX, 99), ValueError, "is no index of a checkpoint: "),
    "index_is_no_text": (lambda f: (f / INDEX).write_bytes(b"\xff{}"), ValueError, "is no index of a chec"),
    "index_names_twice": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
                          ValueError, "it names 'a' twice"),
    "index_too_large": (lambda f: os.truncate(f / INDEX, 1 << 30), ValueError, "at most 33554432 are allowed"),
}


@pytest.mark.parametrize("damage, error, message", REFUSED.values(), ids=REFUSED.keys())
def test_checkpoint_table_refused(damage, error, message, tmp_path):
    folder, names, memory = qwen(tmp_path / "c", num_parts=12, width=16)
    check(RowTable.open(folder, *names), memory)
    before = len(os.listdir("/proc/self/fd"))
    damage(folder)
    with pytest.raises(error, match=rf"RowTable.open: .*{message}"):
        RowTable.open(folder, *names)
    assert len(os.listdir("/proc/self/fd")) <= before  # nothing stays open


NAMES = {
    "two_braces": ("a.{}.{}", ValueError, "tensor is 'a.{}.{}', expected at most one {}"),
    "a_number": (3, TypeError, "tensor is 3, expected a name or a list of names"),
    "no_names": ([], TypeError, r"tensor is \[\], expected a name"),
    "a_set": ({"a"}, TypeError, r"tensor is \{'a'\}, expected a name"),
    "twice": ([QWEN.format(2), QWEN.format(2)], ValueError, "tensor names '.*shard_2.weight' twice"),
    "braces_in_a_list": ([QWEN], ValueError, r"has no tensor '.*shard_\{\}.weight'; it has \S+shard_\{\}.weight \(12 parts\)$"),
    "none": (None, ValueError, r"c: tensor should name the rows; there are \S+shard_\{\}.weight \(12 parts\)$"),
    "no_such": ("embed", ValueError, r"the index has no tensor 'embed'; it has \S+shard_\{\}.weight \(12 parts\)$"),
    "no_such_parts": ("embed.{}", ValueError, r"called 'embed.\{\}' with 0 for \{\}: there is none; it has \S+shard_\{\}.weight"),
    "not_from_0": (QWEN.replace("_{}", "_1{}"), ValueError, None),
}


@pytest.mark.parametrize("names, error, message", NAMES.values(), ids=NAMES.keys())
def test_checkpoint_table_refuses_names(names, error, message, tmp_path):
    folder, _, memory = qwen(tmp_path / "c", num_parts=12, width=16)
    if message is None:  # shard_10 and shard_11 only: they are the parts 0 and 1 of this name, shard_1 has no number
        check(RowTable.open(folder, names), RowTable.from_tensor(memory.rows[50:]))
        return
    with pytest.raises(error, match=rf"RowTable.open: .*{message}"):
        RowTable.open(folder, names)


SOURCES = {
    "a_number": (lambda f: 3, TypeError, "source is 3, expected a path"),
    "an_address": (lambda f: "ray://rows", ValueError,
                   "source is ray://rows, expected a path; an address is for RowTable.connect"),
    "no_paths": (lambda f: [], TypeError, r"source is \[\], expected a path"),
    "twice": (lambda f: [f / "a.safetensors"] * 2, ValueError, "a.safetensors is named twice"),
    "linked": (lambda f: [f / "a.safetensors", f / "link.safetensors"], ValueError,
               "'w' of \\S+link.safetensors lies at the same bytes as 'w' of \\S+a.safetensors: one part, twice"),
    "two_braces": (lambda f: f / "{}-{}.safetensors", ValueError, "should have one {}, in the name of the file"),
    "braces_in_the_folder": (lambda f: f / "{}" / "x", ValueError, "should have one {}, in the name of the file"),
    "no_files": (lambda f: f / "model{}.safetensors", ValueError,
                 r"is called 'model\{\}.safetensors' with 0 for \{\}: there is none"),
    "two_indexes": (lambda f: f / "two", ValueError, "two has several indexes, name one of them: a.safetensors.index.json, b"),
    "empty": (lambda f: f / "empty", ValueError, "empty is a directory without safetensors files; it has pytorch_model.bin$"),
    "in_two_files": (lambda f: f, ValueError, "2 files of \\S+ have a tensor 'w': a.safetensors, link.safetensors. If they"),
    "an_index_not_there": (lambda f: f / "x.json", FileNotFoundError, "No such file or directory"),
}


@pytest.mark.parametrize("source, error, message", SOURCES.values(), ids=SOURCES.keys())
def test_checkpoint_table_refuses_sources(source, error, message, tmp_path):
    save_file({"w": BF16}, tmp_path / "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to("a.safetensors")
    for name in ("two", "empty"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / "two" / f"{name}.safetensors.index.json").write_text("{}")
    (tmp_path / "empty" / "pytorch_model.bin").write_text("")
    with pytest.raises(error, match=f"RowTable.open: .*{message}"):
        RowTable.open(source(tmp_path), "w")


SCALES = {
    "too_few": ({"s.0": (3, 2), "s.1": (3, 2), "s.2": (1, 2)}, "s.{}",
                r"the scales are F8_E8M0 \[7, 2\], expected F8_E8M0 or U8 \[8, 2\] for rows"),
    "other_heights": ({"s.0": (3, 2), "s.1": (5, 2)}, "s.{}", r"part 0 of the scales, 's.0' in t.safetensors is F8_E8M0 \[3, 2\]"
                      r", expected as many rows as part 0 of the rows, 'w.0' in t.safetensors is F8_E4M3 \[4, 64\]"),
    "a_part_is_missing": ({"s.0": (4, 2)}, "s.{}", r"the scales are F8_E8M0 \[4, 2\]"),
    "one_value_each": ({"s.0": (1,), "s.1": (1,)}, "s.{}", r"row_format is needed|the scales are F8_E8M0 \[1\]"),
    "other_width": ({"s.0": (4, 2), "s.1": (4, 1)}, "s.{}", r"part 1, 's.1' in t.safetensors is F8_E8M0 \[4, 1\], expected F8"),
}


@pytest.mark.parametrize("shapes, names, message", SCALES.values(), ids=SCALES.keys())
def test_checkpoint_table_refuses_scales(shapes, names, message, tmp_path):
    scales = {name: torch.zeros(shape, dtype=torch.uint8).view(torch.float8_e8m0fnu) for name, shape in shapes.items()}
    save_file({f"w.{n}": torch.zeros(4, 64).to(torch.float8_e4m3fn) for n in range(2)} | scales, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=f"RowTable.open: .*{message}"):
        RowTable.open(tmp_path, "w.{}", names)


def test_checkpoint_table_ranks_disagree_on_the_scale(tmp_path):
    for rank in range(2):
        save_file({"w": torch.zeros(4, 64).to(torch.float8_e4m3fn), "s": torch.tensor([1.0 + rank])},
                  tmp_path / f"model{rank}-mp2.safetensors")
    with pytest.raises(ValueError, match=r"model1-mp2.safetensors: the scale 's' is 2.0, but 1.0 in \S+model0-mp2.safetensors"):
        RowTable.open(tmp_path / "model{}-mp2.safetensors", "w", "s")


OPTIONS = {  # name: value, error, what the message says
    "queue_depth": [(0, ValueError, "0, expected at least 1"), (4097, ValueError, "4097, expected at most 4096"),
                    ("8", TypeError, "'8', expected an integer"), (True, TypeError, "True, expected an integer")],
    "cache_bytes": [(-1, ValueError, "-1, expected at least 0"), (1.5, TypeError, "1.5, expected an integer"),
                    (2**63, ValueError, "9223372036854775808, expected at most ")],
    "io": [("mmap", ValueError, "'mmap', expected 'auto' or 'io_uring' or 'preadv' or"),
           (None, ValueError, "None, expected 'auto'")],
    "row_dim": [(0, ValueError, "0, expected at least 1"), ("16", TypeError, "'16', expected an integer")],
}


@pytest.mark.parametrize("name, case", [(name, case) for name, cases in OPTIONS.items() for case in cases])
def test_table_open_names_the_option(name, case, tmp_path):
    value, error, message = case
    save_file({"rows": torch.zeros(4, 16)}, tmp_path / "t.safetensors")
    with pytest.raises(error, match=rf"^RowTable.open: {name} is {message}"):
        RowTable.open(tmp_path / "t.safetensors", "rows", row_format="f32", **{name: value})
