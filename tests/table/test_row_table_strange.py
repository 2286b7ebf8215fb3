"""RowTable.open and create on what is no table file, on odd ones, and on a disk that is full."""
import json
import os
import resource
import signal
import time

import pytest
import torch

from engram_kernels import EngramSpec, RowTable, TokenMap, gather_rows

pytestmark = pytest.mark.usefixtures("compiled")
ROWS = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}


def safetensors(path, header, data=bytes(32)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_row_table_open_says_what_other_file_it_was_given(tmp_path):
    safetensors(tmp_path / "model-00001-of-00002.safetensors", {"rows": ROWS})
    with pytest.raises(ValueError, match=f"{tmp_path}: tensor should name the rows; there are rows$"):
        RowTable.open(tmp_path)
    index, pointer = tmp_path / "model.safetensors.index.json", tmp_path / "pointer.safetensors"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match="index.json: tensor should name the rows; there are a$"):
        RowTable.open(index)
    (tmp_path / "config").write_text("{}")
    with pytest.raises(ValueError, match="it is JSON, expected a header"):
        RowTable.open(tmp_path / "config")
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match="Git LFS pointer.*git lfs pull"):
        RowTable.open(pointer)


def test_row_table_open_takes_null_metadata(tmp_path):
    table = RowTable.open(safetensors(tmp_path / "t.safetensors", {"__metadata__": None, "rows": ROWS}))
    assert gather_rows(table, torch.tensor([1])).tolist() == [[0, 0, 0, 0]]


def test_row_table_open_takes_a_scale_of_no_dimension(tmp_path):
    header = {"rows": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]},
              "scales": {"dtype": "F32", "shape": [], "data_offsets": [16, 20]}}
    data = torch.full((16,), 0x38, dtype=torch.uint8).numpy().tobytes() + torch.tensor([3.0]).numpy().tobytes()
    table = RowTable.open(safetensors(tmp_path / "t.safetensors", header, data))
    assert gather_rows(table, torch.tensor([3])).tolist() == [[3, 3, 3, 3]]  # 0x38 is 1.0


@pytest.mark.parametrize(("header", "words"), [
    (b"{" + b",".join(b'"k%d":1' % i for i in range(70_000)) + b',"k69999":2}', "names 'k69999' twice"),
    (b"[" * 800_000, "nested too deeply"),
    (b'{"a":{"dtype":"F32","data_offsets":[0,32],"shape":[' + b",".join([b"%d" % 2**62] * 40_000) + b"]}}", "has shape"),
    (b" " * (17 << 20), "at most 16777216 are allowed")], ids=["last_name_twice", "deep", "many_dimensions", "long"])
def test_row_table_open_refuses_a_bad_header_in_linear_time(header, words, tmp_path):
    path, before = safetensors(tmp_path / "t.safetensors", header), time.process_time()
    with pytest.raises(ValueError, match=words) as error:
        RowTable.open(path)
    assert time.process_time() - before < 5  # 0.8 MB took 49 s
    assert len(str(error.value)) < 600 + len(str(path))


@pytest.fixture
def no_room():
    """Writing past 4096 bytes of a file fails, as on a file system that is full."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("op", ["RowTable.create", "TokenMap.save", "EngramSpec.to_json"])
def test_row_table_files_a_limit_names_path_and_op(op, tmp_path, no_room):
    path = tmp_path / "out"
    write = {"RowTable.create": lambda: RowTable.create(path, torch.zeros(9000, 4), row_format="f32"),
             "TokenMap.save": lambda: TokenMap(torch.randperm(90_000).int(), 90_000, "x").save(path),
             "EngramSpec.to_json": lambda: EngramSpec.demo_v1(name="x" * 9000).to_json(path)}[op]
    with pytest.raises(OSError, match=op) as error:
        write()
    assert str(path) in str(error.value)
    assert os.listdir(tmp_path) == []
