"""MemoryState: any mix of calls gives what the whole sequence gives; bad use is named; nothing waits for the device."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from module_cases import make_layer, make_spec
from op_cases import packed
from state_cases import Traffic
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engram_kernels import Engram, EngramSpec, LongcatEmbedding, MemoryPrefetcher, MemoryState, RowTable

OP = "ngram_hash"
FAMILIES = ("deepseek_v41", "demo_v1", "qwen4_ple", "longcat", "longcat_next")


def layers_of(family):
    """The layers of a small model of the family, and its spec."""
    if family.startswith("longcat"):
        next_rules = dict(ignored_token_ids=(5,), zero_is_dead=True) if family == "longcat_next" else {}
        spec = EngramSpec.longcat(vocab_size=500, table_sizes=(20,) * 3, head_dim=32, hidden_size=32, pad_token_id=3,
                                  eos_token_id=7, **next_rules)
        torch.manual_seed(0)
        layer = LongcatEmbedding(spec, dtype=torch.float32, train_table=True).requires_grad_(False)
        layer.rows.mul_(50)
        return [layer], spec
    spec = make_spec(family, **({"eos_token_id": 7, "pad_token_id": 7} if family == "qwen4_ple" else {}))
    first = make_layer(family, spec=spec)[0]
    layers = []
    for layer_id in spec.layer_ids:
        layer = Engram(spec, layer_id, dtype=torch.float32)
        layer.load_state_dict(first.state_dict())
        rows = torch.randn(layer.layout.num_rows[0], spec.row_dim, generator=torch.Generator().manual_seed(layer_id))
        layer.table = RowTable.from_tensor(rows, row_format="f32")
        layers.append(layer.requires_grad_(False))
    return layers, spec


def run(family, seed, calls, backend, with_layers=False):
    layers, spec = layers_of(family)
    # the interpreter takes seconds per call of a layer: its layers run in one test, elsewhere its hash alone
    traffic = Traffic(layers, spec, seed % 4, backend, seed, "auto" if backend == "triton" and not with_layers else None)
    with torch.no_grad():
        for _ in range(calls):
            traffic.call()
    assert traffic.compared or calls < 10  # a few calls may all be removals


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_state_any_mix_equals_the_whole(family, backend):
    for seed in (3, 5):
        run(family, seed, 5 if backend == "triton" else 20, backend)


@pytest.mark.slow
def test_memory_state_any_mix_with_layers_in_triton():
    run("qwen4_ple", 3, 3, "triton", with_layers=True)


@pytest.mark.slow
@given(st.integers(0, 10**6), st.sampled_from(FAMILIES))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_memory_state_property(backend, seed, family):
    run(family, seed, 4 if backend == "triton" else 25, backend)


def small(max_drafts=2, **options):
    layers, spec = layers_of("demo_v1")
    return MemoryState(layers, 3, max_drafts=max_drafts, **options), layers, spec


def started(max_drafts=2):
    """Slots 0 and 2 have sequences of 3 and 1 tokens."""
    state, layers, _ = small(max_drafts)
    state.prefill(torch.tensor([4, 5, 6, 7]), packed([3, 1]), torch.tensor([0, 2]))
    run_layers(state, layers, 4)
    return state, layers


def run_layers(state, layers, tokens):
    with torch.no_grad():
        for layer in layers:
            layer(torch.randn(tokens, layer.branches, layer.hidden_size), **state.arguments(layer))


def snapshot(state):
    return [x.clone() for x in (state.history, state._counters, *state.rings.values(), *state._ends.values())]


def drafted(state):
    state.step(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 2]))


BAD = {  # name: (what went before, the call, message)
    "commit_of_more": (drafted, lambda s: s.commit(torch.tensor([1, 2])), r"accepted\[1\] is 2, expected \[0, 1\].*slot 2"),
    "commit_negative": (drafted, lambda s: s.commit(torch.tensor([-1, 0])), r"accepted\[0\] is -1"),
    "commit_of_none_drafted": (None, lambda s: s.commit(torch.tensor([0, 1])), r"accepted\[1\] is 1, expected \[0, 0\]"),
    "commit_shape": (drafted, lambda s: s.commit(torch.tensor([1])), r"accepted must have shape \[2\]"),
    "step_without_commit": (drafted, lambda s: s.step(torch.tensor([1]), torch.tensor([2])), r"slots\[0\] is 2.*no commit"),
    "prefill_without_commit": (drafted, lambda s: s.prefill(torch.tensor([1]), packed([1]), torch.tensor([0])), "no commit"),
    "removed": (lambda s: s.remove(torch.tensor([2])), lambda s: s.step(torch.tensor([1, 2]), torch.tensor([0, 2])),
                r"slots\[1\] is 2, which has no sequence: it was removed"),
    "never_filled": (None, lambda s: s.step(torch.tensor([1]), torch.tensor([1])), r"slots\[0\] is 1, which has no sequence"),
    "too_many_drafts": (None, lambda s: s.step(torch.tensor([[1, 2, 3, 4]]), torch.tensor([0])), "3 drafts, expected at most 2"),
    "too_many_in_a_chunk": (None, lambda s: s.prefill(torch.arange(5), packed([5]), torch.tensor([0]), drafts=torch.tensor([3])),
                            r"drafts\[0\] is 3"),
    "more_drafts_than_tokens": (None, lambda s: s.prefill(torch.arange(1), packed([1]), torch.tensor([0]),
                                                          drafts=torch.tensor([2])), r"drafts\[0\] is 2"),
    "no_slot": (None, lambda s: s.step(torch.tensor([1]), torch.tensor([3])), r"slots\[0\] is 3, which is not in \[0, 3\)"),
    "slot_twice": (None, lambda s: s.step(torch.tensor([1, 1]), torch.tensor([2, 2])), "state_indices.* are both 2"),
    "bad_id": (None, lambda s: s.step(torch.tensor([-5]), torch.tensor([2])), r"token_ids\[0\] is -5"),
    "reorder_source": (None, lambda s: s.reorder(torch.tensor([1, 0])), r"sources\[0\] is 1, which has no sequence"),
    "reorder_twice": (None, lambda s: s.reorder(torch.tensor([0, 2]), torch.tensor([1, 1])), r"slots\[1\] is 1, .* twice"),
    "commit_twice": (drafted, lambda s: s.commit(torch.tensor([1, 0]), torch.tensor([2, 2])), r"slots\[1\] is 2, .* twice"),
    "ids_dtype": (None, lambda s: s.step(torch.tensor([1]).int(), torch.tensor([2])), "token_ids must be torch.int64, got"),
    "ids_shape": (None, lambda s: s.prefill(torch.tensor([[1]]), packed([1]), torch.tensor([2])), r"token_ids must have shape"),
    "bounds": (None, lambda s: s.prefill(torch.arange(4), torch.tensor([0, 5, 4]).int(), torch.tensor([0, 2])), "cu_seqlens"),
    "slots_dtype": (None, lambda s: s.step(torch.tensor([1]), torch.tensor([2], dtype=torch.int32)), "slots must be torch.int64"),
    "layer": (None, lambda s: s.arguments(77), "layer is 77, expected one of"),
    "module": (None, lambda s: s.arguments(torch.nn.Linear(1, 1)), "layer is a Linear, expected a memory module"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_memory_state_names_bad_use_and_changes_nothing(case):
    before, bad, message = case
    state, _ = started()
    if before is not None:
        before(state)
    held = snapshot(state)
    with pytest.raises((ValueError, IndexError, TypeError), match=message):
        bad(state)
    assert all(torch.equal(a, b) for a, b in zip(held, snapshot(state), strict=True))


def test_memory_state_counts_bad_use_that_it_cannot_look_at(monkeypatch):
    """As on a GPU: the sequence is skipped, the others go on, and `check_errors` names what it was."""
    state, _ = started()
    twin, _ = started()
    monkeypatch.setattr(MemoryState, "_can_look", lambda self: False)
    drafted(state), drafted(twin)
    assert (state.step(torch.tensor([1, 1, 1]), torch.tensor([0, 1, 9])) == -1).all()  # not committed, no sequence, no slot
    state.commit(torch.tensor([1, 2]), torch.tensor([0, 2]))  # too much for slot 2: as if all was accepted
    twin.commit(torch.tensor([1, 1]), torch.tensor([0, 2]))
    state.reorder(torch.tensor([2, 0]), torch.tensor([1, 1]))  # the first counts
    twin.reorder(torch.tensor([2]), torch.tensor([1]))
    assert all(torch.equal(a[:3], b[:3]) for a, b in zip(snapshot(state), snapshot(twin), strict=True))
    with pytest.raises(ValueError, match="1 slots that are none; 1 slots without a sequence; 1 steps before the commit of "
                                         "earlier drafts; 1 commits of more than was drafted; 1 slots that are named twice"):
        state.check_errors()
    state.check_errors(), twin.check_errors()


MAKE = {  # name: (arguments, error, message)
    "no_layers": (lambda: MemoryState([], 2), ValueError, "there is no memory module"),
    "none": (lambda: MemoryState(None, 2), TypeError, "layers is a NoneType, expected a model"),
    "map": (lambda: MemoryState(layers_of("demo_v1")[1], 1, token_map=3), TypeError, "token_map is a int"),
    "slots_bool": (lambda: MemoryState(layers_of("demo_v1")[1], True), TypeError, "num_slots is True"),
    "no_module": (lambda: MemoryState([3], 2), TypeError, "layers has a int"),
    "slots": (lambda: small()[0].__class__(layers_of("demo_v1")[1], 0), ValueError, "num_slots is 0"),
    "drafts": (lambda: MemoryState(layers_of("demo_v1")[1], 1, max_drafts=-1), ValueError, "max_drafts is -1"),
    "dtype": (lambda: MemoryState(layers_of("demo_v1")[1], 1, dtype=torch.float64), ValueError, "dtype is torch.float64"),
    "ids": (lambda: MemoryState(layers_of("demo_v1")[1], 1, token_dtype=torch.int16), ValueError, "token_dtype is torch.int16"),
    "specs": (lambda: MemoryState([layers_of(x)[0][0] for x in FAMILIES[:2]], 1), ValueError, "different specs"),
    "twice": (lambda: MemoryState([layers_of("demo_v1")[0][0]] * 2, 1), ValueError, "expected each once"),
    "commit_first": (lambda: small()[0].commit(torch.tensor([0])), ValueError, "no prefill and no step before"),
}


@pytest.mark.parametrize("make, error, message", MAKE.values(), ids=MAKE.keys())
def test_memory_state_rejects(make, error, message):
    with pytest.raises(error, match=f"MemoryState.*{message}"):
        make()


class Waits(TorchDispatchMode):
    """Counts what would make a host wait for a GPU."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
        self.count += func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


def test_memory_state_no_call_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(MemoryState, "_can_look", lambda self: False)
    state, layers = started()
    with torch.no_grad(), Waits() as waits:
        state.step(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 2]))
        run_layers(state, layers, 4)
        state.commit(torch.tensor([0, 1]))
        state.reorder(torch.tensor([2, 2]))
        state.remove(torch.tensor([2, -1]))
    assert waits.count == 0
    with waits:
        torch.ones(1).item()
    assert waits.count == 1


def test_memory_state_in_fake_mode():
    layers, _ = layers_of("demo_v1")
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = MemoryState(layers, 4, max_drafts=1)
        rows = state.prefill(torch.zeros(5, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), torch.zeros(2).long())
        assert rows.shape == (2, 5, 16)
        assert state.step(torch.zeros(2, 2).long(), torch.zeros(2).long()).shape == (2, 4, 16)
        state.commit(torch.zeros(2).long())
        state.reorder(torch.zeros(2).long())
        state.remove(torch.zeros(2).long())


def test_memory_state_compiles_as_one_graph():
    layers, _ = layers_of("demo_v1")
    states = [MemoryState(layers, 3, max_drafts=1) for _ in range(2)]
    slots, ids, accepted = torch.tensor([2, 0]), torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])
    hidden = torch.randn(4, layers[0].branches, layers[0].hidden_size)

    def step(state, hidden):
        state.step(ids, slots)
        for layer in layers:
            hidden = hidden + layer(hidden, **state.arguments(layer))
        state.commit(accepted)
        return hidden

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for state in states:
            state.prefill(torch.tensor([7, 8, 9]), packed([1, 2]), slots)
            for layer in layers:
                layer(hidden[:3], **state.arguments(layer))
        for _ in range(2):
            torch.testing.assert_close(compiled(states[0], hidden), step(states[1], hidden))
    assert all(torch.equal(a[:3], b[:3]) for a, b in zip(snapshot(states[0]), snapshot(states[1]), strict=True))
    states[0].check_errors()


def test_memory_state_finds_the_layers_of_a_model():
    layers, spec = layers_of("demo_v1")
    state = MemoryState(torch.nn.ModuleDict({"b": layers[1], "x": torch.nn.Linear(2, 2), "a": layers[0]}), 2)
    assert list(state.rings) == list(spec.layer_ids) and state.dtype == torch.float32


def test_memory_state_and_prefetcher_serve_longcat_next(tmp_path):
    """Absent rows are -1 in both, as the module hashes them: of 0 and ignored ids, and where a hash is 0."""
    (layer,), spec = layers_of("longcat_next")
    layer.table = RowTable.create(tmp_path / "rows", layer.rows.detach(), row_format="f32")
    generator = torch.Generator().manual_seed(3)
    ids, cu = torch.randint(0, 40, (400,), generator=generator), packed([150, 250])
    want = layer.hash(ids, cu, backend="reference")
    alive = ~spec.dead_mask(ids)
    assert (want[~alive] == -1).all() and (want[alive] == -1).any(), "no column hashed to 0"
    state = MemoryState(layer, 2)
    with MemoryPrefetcher(layer) as prefetcher, torch.no_grad():
        ticket = prefetcher.submit(ids, cu)
        assert torch.equal(ticket.row_ids[0], want)
        out = layer(ids, cu)
        assert torch.equal(layer(ids, rows=prefetcher.wait(layer, ticket)), out)
        first = torch.cat([ids[:60], ids[150:200]])
        state.prefill(first, packed([60, 50]), torch.tensor([1, 0]))
        rest = torch.cat([ids[60:150], ids[200:]])
        row_ids = state.prefill(rest, packed([90, 200]), torch.tensor([1, 0]))
        assert torch.equal(row_ids[0], torch.cat([want[60:150], want[200:]]))
        ticket = prefetcher.submit(row_ids=row_ids)
        got = layer(rest, **state.arguments(layer, rows=prefetcher.wait(layer, ticket)))
        torch.testing.assert_close(got, torch.cat([out[60:150], out[200:]]), rtol=1e-6, atol=1e-6)
