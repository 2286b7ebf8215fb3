"""Two processes: training with DDP, FSDP1 and FSDP2 equals one process; started processes get tables and modules."""
import io
import multiprocessing

import module_processes
import pytest
import torch
import torch.multiprocessing
from module_cases import CU, make_layer

from engram_kernels import RowTable, gather_rows


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(module_processes.train, args=(str(folder / "store"), str(folder / "result")),
                                nprocs=module_processes.PROCESSES)
    return torch.load(folder / "result")


@pytest.mark.parametrize("variant", ["deepseek_v41", "demo_v1"])
@pytest.mark.parametrize("kind", module_processes.KINDS)
def test_engram_trains_on_two_processes_as_on_one(kind, variant, together):
    before, want = module_processes.trained_alone(variant)
    assert set(together[kind, variant]) == set(want)
    for name, value in want.items():
        moved = (value - before[name]).abs().max().item()
        assert moved > 1e-5, name
        # the same sums in another order; a gradient that was lost would be off by all that moved
        torch.testing.assert_close(together[kind, variant][name], value, rtol=1e-5, atol=1e-3 * moved)


def test_started_processes_get_tables_and_modules(tmp_path, request):
    """spawn: a file is opened again, a shared table attached, private memory copied; the parent's rows stay where they are."""
    layer, ids, hidden = make_layer("deepseek_v41")
    trained = make_layer("deepseek_v41", trained_rows=True)[0]
    rows = layer.table.rows
    file = RowTable.create(tmp_path / "rows.safetensors", rows, row_format="f32")
    own = RowTable.from_tensor(rows, row_format="f32", copy=True)
    shared = own.share(f"test-spawn-{tmp_path.name}")
    tables = [file, own, shared]
    in_file = make_layer("deepseek_v41")[0]
    in_file.table = file
    places = [table.rows.data_ptr() for table in (own, shared)]
    some = torch.stack([ids, ids.flip(0)], 1).contiguous()
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=module_processes.answer, args=(theirs, (some, hidden, CU, tables, [in_file, trained])))
    process.start()
    theirs.close()
    assert ours.poll(120), "no answer"
    answers, tiers, texts = torch.load(io.BytesIO(ours.recv_bytes()))
    process.join()
    assert process.exitcode == 0 and tiers == ["file", "host", "host"] and f"test-spawn-{tmp_path.name}" in texts[2]
    with torch.no_grad():
        want = [gather_rows(layer.table, some, torch.float32)] * 3 + [layer(hidden, ids, CU)] * 2
    for got, expected in zip(answers, want, strict=True):
        assert torch.equal(got, expected)
    assert [table.rows.data_ptr() for table in (own, shared)] == places


@pytest.mark.parametrize("tier", ["file", "own"])
def test_dataloader_workers_read_a_table(tier, tmp_path):
    rows = torch.randn(8, 32)
    table = (RowTable.create(tmp_path / "rows.safetensors", rows, row_format="f32") if tier == "file"
             else RowTable.from_tensor(rows, row_format="f32", copy=True))
    loader = torch.utils.data.DataLoader(module_processes.TableDataset(table), batch_size=4, num_workers=1,
                                         multiprocessing_context="spawn")
    assert torch.equal(torch.cat(list(loader)), rows)
