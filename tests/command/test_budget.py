"""`ek.budget` and `engram-kernels budget`: published sizes, what is kept equal, bad input, what is written."""
import dataclasses
import json
import sys

import moe_configs
import pytest
import torch
from hf_configs import QWEN4_CONFIG, V41_CONFIG
from moe_configs import (
    MIXTRAL_CONFIG,
    PAPER_27B_CONFIG,
    PAPER_40B_MEMORY,
    PUBLISHED,
    QWEN3_30B_CONFIG,
    V2_LITE_CONFIG,
    V3_CONFIG,
)
from plan_profiles import DISK, GPU, HOST, profile_of, write

import engram_kernels as ek
from engram_kernels.allocation import curve
from engram_kernels.allocation.moe_model import model_of_config
from engram_kernels.cli import main as cli
from engram_kernels.cli.options import load_spec

PAPER = dict(total=26.7e9, active=3.8e9, orders=(2, 3), layers=(1, 14))


def run(capsys, *arguments):
    code = cli.main(["budget", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B_CONFIG))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_budget_counts_published_models_to_the_parameter(name):
    total, active = PUBLISHED[name]
    model = model_of_config(getattr(moe_configs, name))
    assert model.total == total
    low = model.active - model.lookups  # some cards count the embedding, some do not
    assert low / 1e9 <= active * 1.03 and active <= model.active / 1e9 * 1.03


def test_budget_golden_engram_27b():
    found = ek.budget(PAPER_27B_CONFIG, rho=0.743, **PAPER)
    row = found.chosen
    assert row.routed_experts == 55 and row.rho == pytest.approx(0.743, rel=0.005)
    assert row.tables == pytest.approx(2_262_400 * 1280 * 2, rel=0.005)
    assert all(size == pytest.approx(2_262_400, rel=0.005) for size in row.spec.table_sizes)
    assert 5.7e9 <= row.tables < 5.8e9  # the paper cuts 5.79 to 5.7
    assert row.total == pytest.approx(26.7e9, rel=1e-4)
    assert row.sparse == pytest.approx((72 - 6) * 29 * 3 * 2560 * 1536, rel=0.005)
    assert row.spec.head_dim == 80 and row.spec.rows_per_token == 32 and row.spec.branches == 4


@pytest.mark.parametrize(("total", "active", "most", "fewest"), [(5.7e9, 568e6, 106, 46), (9.9e9, 993e6, 99, 43)])
def test_budget_golden_sweeps_of_the_paper(total, active, most, fewest):
    """Experts at rho 1 and 0.4."""
    found = ek.budget(total=total, active=active, experts=most, rho=(0.4, 1))
    assert [row.routed_experts for row in found.rows] == [most, fewest]
    assert found.rows[1].rho == pytest.approx(0.4, abs=0.005)


def test_budget_golden_engram_40b():
    small = ek.budget(PAPER_27B_CONFIG, rho=0.743, **PAPER).chosen
    large = ek.budget(PAPER_27B_CONFIG | PAPER_40B_MEMORY | {"n_routed_experts": 55}, total=39.5e9, active=3.8e9).configured
    memory = large.spec
    assert memory.num_parameters == pytest.approx(18.5e9, rel=0.005)
    assert small.total - small.tables - small.modules + memory.num_parameters == pytest.approx(39.5e9, rel=0.005)
    idle = (55 - 6) * 29 * 3 * 2560 * 1536
    assert large.rho == pytest.approx(idle / (idle + 18.5e9), rel=0.005)


def test_budget_golden_published_memories():
    v41, qwen = ek.EngramSpec.from_hf_config(V41_CONFIG), ek.EngramSpec.from_hf_config(QWEN4_CONFIG)
    assert v41.num_table_parameters == 256 * (384_006_168 + 384_016_682) and v41.bytes() / 2**30 == pytest.approx(188.8, abs=0.05)
    assert qwen.num_table_parameters == 160 * 320_001_446
    assert qwen.bytes("fp8_e4m3_tensor") / 2**30 == pytest.approx(47.68, abs=0.005)


@pytest.mark.parametrize("name", ["deepseek_v41", "demo_v1", "qwen4_ple"])
def test_spec_counts_the_parameters_of_its_modules(name):
    spec = getattr(ek.EngramSpec, name)()
    module = ek.Engram(spec, spec.layer_ids[0], device="meta")
    assert sum(p.numel() for p in module.parameters()) * len(spec.layer_ids) == spec.num_module_parameters
    assert spec.num_parameters == spec.num_module_parameters + spec.head_dim * sum(spec.layout().num_rows)


def test_spec_flops_per_token_by_hand():
    spec = ek.EngramSpec.deepseek_v41()
    assert spec.flops_per_token() == 2 * (2 * 6144 * 5 * 5120 + 10 * 4 * 5120)
    assert spec.flops_per_token(64, 1) == 2 * (2 * 6144 * 2 * 64 + 10 * 64)
    demo = ek.EngramSpec.demo_v1()  # biases, no residual, 4 taps
    assert demo.flops_per_token() == 2 * ((2 * 1024 + 1) * 5 * 1024 + (9 + 6 + 8) * 4 * 1024)
    longcat = ek.EngramSpec.longcat()
    assert (longcat.num_module_parameters, longcat.flops_per_token()) == (3072 * 3072, (2 * 3072 + 2) * 3072)
    assert longcat.num_table_parameters == 256 * 122_683_536
    bare = ek.EngramSpec.deepseek_v41(variant="none")
    assert (bare.num_module_parameters, bare.flops_per_token()) == (0, 0)
    with pytest.raises(ValueError, match="hidden_size is 0"):
        spec.flops_per_token(hidden=0)


def test_spec_bytes_by_row_format():
    spec = ek.EngramSpec.deepseek_v41(row_format="fp8_e4m3_block32_packed", row_stride_bytes=288)
    rows = sum(spec.layout().num_rows)
    assert (spec.bytes(), spec.bytes("fp8_e4m3_block32_packed"), spec.bytes("bf16")) == (288 * rows, 264 * rows, 512 * rows)
    with pytest.raises(ValueError, match="row_format is 'fp7'"):
        spec.bytes("fp7")
    with pytest.raises(ValueError, match="head_dim is 80, expected a multiple of 32"):
        ek.EngramSpec.demo_v1(head_dim=80).bytes("int8_group32")


@pytest.mark.parametrize("config", [V2_LITE_CONFIG, QWEN3_30B_CONFIG, MIXTRAL_CONFIG, PAPER_27B_CONFIG | {"hc_mult": 4}],
                         ids=["deepseek", "qwen", "mixtral", "paper"])
def test_budget_keeps_the_parameters_equal(config):
    found = ek.budget(config, **(dict(total=26.7e9, active=3.8e9) if config.get("hc_mult") else {}))
    whole = found.rows[0].total
    assert found.rows[0].spec is None and found.rows[0].rho == 1
    for row in found.rows[1:]:
        spec = row.spec
        # 1 + 200 rows per head: primes lie apart
        assert 0 <= row.unspent < 201 * spec.rows_per_token * spec.head_dim and row.total == pytest.approx(whole, rel=1e-4)
        assert row.tables == spec.head_dim * sum(spec.layout().num_rows) and row.modules == spec.num_module_parameters
        given_up = (found.model.experts - row.routed_experts) * (found.model.expert_parameters + found.model.router_parameters)
        assert row.tables + row.modules + row.unspent == pytest.approx(given_up)
        idle = (row.routed_experts - found.model.top_k) * found.model.expert_parameters
        assert row.sparse == pytest.approx(idle + row.tables - spec.rows_per_token * spec.head_dim)
        assert row.rho == pytest.approx(idle / row.sparse)
        if "num_attention_heads" in config:  # counted, not given
            assert row.sparse == pytest.approx(row.total - row.active)
        routers = (found.model.experts - row.routed_experts) * found.model.router_parameters
        assert row.active == pytest.approx(
            found.model.active - routers + spec.num_module_parameters + spec.rows_per_token * spec.head_dim)
        if row.narrower is not None:
            assert row.narrower * found.model.shared_width_parameters >= row.modules


def test_budget_experts_are_the_nearest_multiple():
    found = ek.budget(PAPER_27B_CONFIG, experts_multiple=8, **PAPER)
    assert {row.routed_experts for row in found.rows} == {40, 48, 56, 64, 72} and found.merged
    for row in found.rows:
        assert row.routed_experts % 8 == 0
        exact = 6 + row.asked * 66
        assert abs(row.routed_experts - exact) <= 4
    odd = ek.budget(QWEN3_30B_CONFIG, experts_multiple=100)
    assert [(row.routed_experts, row.spec is None) for row in odd.rows] == [(128, True), (100, False)]
    assert odd.chosen.routed_experts == 100 and odd.chosen.unspent < 1e-4 * odd.chosen.total
    assert ek.budget(PAPER_27B_CONFIG, rho=0.743, experts_multiple=8, **PAPER).chosen.routed_experts == 56


def test_budget_of_a_model_with_a_memory():
    text = V41_CONFIG["text_config"] | {"num_hidden_layers": 48, "n_routed_experts": 64, "moe_intermediate_size": 1024,
                                        "num_experts_per_tok": 8, "n_shared_experts": 1, "pad_token_id": 2}
    found = ek.budget(V41_CONFIG | {"text_config": text}, total=400e9, active=20e9)
    own = ek.EngramSpec.from_hf_config(V41_CONFIG)
    assert found.model.memory == own and found.configured.tables == own.num_table_parameters
    assert found.configured.total == pytest.approx(400e9) and found.configured.active == pytest.approx(20e9)
    without = found.rows[0]
    assert without.spec is None and without.routed_experts > 64  # what the memory has, experts have
    for row in found.rows[1:]:
        assert row.spec is None or (row.spec.max_order, row.spec.layer_ids, row.spec.num_classes) == (4, (1, 14), 99_092)
        assert row.total == pytest.approx(400e9, rel=1e-3)


def test_budget_of_totals_alone_assumes_the_rest():
    found = ek.budget(total=26.7e9, active=3.8e9, rho=0.743)
    assert found.chosen.routed_experts == 55
    assert found.inputs["total parameters"].provenance == "given" and found.inputs["hidden size"].provenance == "assumed"
    other = ek.budget(total=26.7e9, active=3.8e9, rho=0.743, experts=128, top_k=8, hidden_size=4096, num_layers=12)
    assert other.chosen.routed_experts == 8 + round(0.743 * 120) and other.chosen.spec.hidden_size == 4096
    assert other.inputs["hidden size"].provenance == "given"


def test_curve_is_the_papers_and_ends_where_it_was_measured():
    assert [curve.loss(rho).value for rho, _ in curve.POINTS] == [loss for _, loss in curve.POINTS]
    assert curve.loss(0.9).value == pytest.approx((1.7109 + 1.7248) / 2) and curve.loss(0.39) is None
    assert (curve.place(0.775), curve.place(0.9), curve.place(0.3)) == ("best", "measured", "outside")
    assert ek.budget(total=9.9e9, active=993e6, experts=99, rho=0.8).outside == ()
    far = ek.budget(V3_CONFIG, orders=(2, 3, 4)).outside
    assert [line.partition(":")[0].split()[0] for line in far] == ["size", "sparsity", "orders", "branches"]


@pytest.mark.parametrize(("arguments", "said"), [
    (dict(rho=1.2), "rho is 1.2, expected a share in 0..1; nearest: 1"),
    (dict(rho=-0.1), "nearest: 0"), (dict(rho=float("nan")), "rho is nan"), (dict(rho=()), "no rho is given"),
    (dict(choose=2), "choose is 2"),
    (dict(layers=(2, 99)), "layer 99 is none of the model's, which are 0..47; nearest: 47"),
    (dict(layers=(-1,)), "layer -1 is none of the model's, which are 0..47; nearest: 0"),
    (dict(orders=(2, 4)), "orders are 2,4, expected 2 up to at most 8 without a gap; nearest: 2,3,4"),
    (dict(orders=()), "orders are none"), (dict(orders=(3,)), "nearest: 2,3"), (dict(heads=0), "heads is 0"),
    (dict(row_format="fp7"), "row_format is 'fp7', expected one of f32"),
    (dict(head_dim=33, row_format="int8_group32"), "head_dim"),
    (dict(experts_multiple=0), "experts_multiple is 0"),
    (dict(experts_multiple=128), "rho 0.5 leaves no expert to give up in multiples of 128: the nearest whole number is all 128; "
                                 "nearest --experts-multiple that works: 127"),
    (dict(experts_multiple=200), "no multiple of 200 lies between the 8 experts that a token takes and the 128 that the "
                                 "budget has; nearest --experts-multiple that works: 127"),
    (dict(rho=0.5, row_format=""), "row_format is ''"), (dict(rho="0.75"), "rho is '0.75'"), (dict(choose="x"), "choose is 'x'"),
    (dict(layers=(2, 2)), "layers are 2,2, expected each layer once and at least one; nearest: 2"),
    (dict(layers=()), "layers are none"), (dict(layers=5), "layers is 5"), (dict(orders=3), "orders is 3"),
    (dict(total="26.7B", active=3e9), "total is '26.7B', expected a number"), (dict(branches=0), "branches is 0"),
    (dict(heads=2.5), "heads is 2.5"), (dict(rho=0.75, step_ms=5), "but no profile"),
    (dict(rho=0.999), "rho 0.999 leaves no expert to give up in multiples of 1: the nearest whole number is all 128; nearest rho "
                      "that works: 0.992, 127 experts"),
    (dict(rho=0.5, heads=1, orders=(2,), head_dim=1), "row ids are int32"),
    (dict(rho=0.5, heads=1, orders=(2,), head_dim=1), "nearest rho that works: 0.850, 110 experts"),
    (dict(experts=4), "experts beside a configuration"), (dict(total=1e9), "one of --total and --active is given"),
    (dict(total=1e9, active=2e9), "--active 2e+09 is not below --total 1e+09"),
    (dict(total=30e9, active=29e9), None), (dict(total=2e9, active=1e9), "leave no room for 120 idle experts"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_budget_rejects(arguments, said):
    if said is None:
        assert ek.budget(QWEN3_30B_CONFIG, **arguments).chosen.spec is not None  # odd, and no contradiction
        return
    with pytest.raises(ValueError) as caught:
        ek.budget(QWEN3_30B_CONFIG, **arguments)
    assert str(caught.value).startswith("budget: ") and said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "said"), [
    ({"num_experts": None}, "has no routed experts: none of n_routed_experts, num_experts, num_local_experts is set"),
    ({"num_experts_per_tok": 128}, "num_experts_per_tok is 128 of 128 experts, so nothing is sparse; the "
                                   "nearest that works is 127"),
    ({"model_type": "qwen9"}, "the attention of model_type 'qwen9' is not counted here"),
    ({"layer_types": ["linear_attention"] * 48}, "with layer_types is not counted here"),
    ({"hidden_size": "big"}, "hidden_size is 'big', expected an integer"), ({"hidden_size": None}, "has no field hidden_size"),
    ({"mlp_only_layers": list(range(48))}, "none of the 48 layers"), ({"mlp_only_layers": "x"}, "mlp_only_layers is 'x'"),
    ({"engram_layer_ids": [1]}, "its memory: the configuration has no field engram_max_ngram_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected an integer in [1, 100000]"),
    ({"hc_mult": "4"}, "hc_mult is '4'"), ({"num_experts": 0}, "num_experts is 0"),
    ({"num_attention_heads": True}, "num_attention_heads is True")], ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_budget_rejects_configurations(change, said, config, capsys):
    config.write_text(json.dumps(QWEN3_30B_CONFIG | change))
    code, out = run(capsys, "--config", config)
    assert code == 1 and said in out.err and out.err.count("\n") == 1 and out.out == ""


@pytest.mark.parametrize("arguments", [
    [], ["--total", "3e9"], ["--total", "3e9", "--active", "5e9"], ["--config", "no/such/file"], ["--layers", "99"],
    ["--choose", "1.5"], ["--plot", "a.xyz"], ["--step-ms", "5"],
    ["--experts-multiple", "1000"], ["--profile", "no/such/profile"], ["--row-format", "x"]],
    ids=lambda a: "_".join(a).replace("/", ".") or "none")
def test_budget_usage_errors(arguments, config, capsys):
    model = [] if not arguments or {"--total", "--config"} & set(arguments) else ["--config", config]
    code, out = run(capsys, *model, *arguments)
    assert code == 2 and out.err.startswith("engram-kernels budget: ") and out.err.count("\n") == 1 and out.out == ""


@pytest.mark.parametrize("text", ["1.1", "0.5:1", "1:0.5:0.1", "0:1:1e-9", "a", "", "0:1:0", "-0.1"])
def test_budget_rho_is_read_strictly(text, config, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["budget", "--config", str(config), f"--rho={text}"])
    assert stop.value.code == 2 and "--rho" in capsys.readouterr().err


def test_budget_prints_within_a_hundred_columns(config, capsys, tmp_path):
    report = write(tmp_path / "p.json", profile_of([*HOST, *DISK, *GPU], [{"name": "NVIDIA H100 80GB HBM3",
                                                                          "memory_bytes": 80 * 10**9}]))
    for extra in ([], ["--profile", report, "--explain"], ["--orders", "2,3,4", "--row-format", "fp8_e4m3_block32_packed"]):
        code, out = run(capsys, "--config", config, *extra)
        assert code == 0 and out.err == "" and max(map(len, out.out.splitlines())) <= 100
        assert "chosen: rho 0.750 (c): num_experts 128 -> 98" in out.out
    assert "\x1b" not in out.out


def test_budget_with_a_profile_says_what_a_step_waits(config, capsys, tmp_path):
    report = write(tmp_path / "p.json", profile_of([*HOST, *DISK]))
    code, out = run(capsys, "--config", config, "--rho", "0.6,0.8", "--profile", report, "--json")
    rows = json.loads(out.out)["rows"]
    assert code == 0 and [row["placement"] for row in rows] == ["staged", "staged"]
    assert all(row["exposed_s"]["provenance"] in ("measured", "assumed") and row["exposed_s"]["value"] >= 0 for row in rows)
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert run(capsys, "--config", config, "--profile", bad)[0] == 1


def test_budget_json_tags_every_number(config, capsys):
    code, out = run(capsys, "--config", config, "--json")
    found = json.loads(out.out)
    assert code == 0 and "chosen: " in out.err
    for row in found["rows"]:
        for number in row["numbers"].values():
            assert set(number) == {"value", "unit", "provenance", "source"} and number["source"]
            assert number["provenance"] in ("given", "computed", "measured elsewhere", "assumed")
    assert found["rows"][0]["numbers"]["paper_loss"]["provenance"] == "measured elsewhere"
    assert found["chosen"]["routed_experts"] == 98 and found["chosen"]["experts_field"] == "num_experts"


def test_budget_writes_what_plan_reads(config, capsys, tmp_path):
    folder, figure = tmp_path / "out", tmp_path / "budget.png"
    code, _ = run(capsys, "--config", config, "--rho", "0.75", "--write", folder, "--plot", figure)
    spec, choice = ek.EngramSpec.from_json(folder / "spec.json"), json.loads((folder / "choice.json").read_text())
    assert code == 0 and figure.read_bytes().startswith(b"\x89PNG")
    assert choice["routed_experts"] == 98 and choice["spec"]["table_sizes"] == list(spec.table_sizes)
    assert spec == ek.budget(QWEN3_30B_CONFIG, rho=0.75).chosen.spec
    assert load_spec(str(folder / "spec.json")) == spec
    code, out = run(capsys, "--config", config, "--rho", "1", "--write", folder)
    assert code == 2 and "the chosen row has no memory" in out.err and out.out == ""
    small = dataclasses.replace(spec, table_sizes=(50, 50), hidden_size=16, row_format="f32")
    memory = ek.Engram(small, 1, table=ek.RowTable.from_tensor(torch.randn(small.layout().num_rows[0], small.head_dim),
                                                                row_format="f32"),
                       dtype=torch.float32)
    assert memory(torch.randn(5, 1, 16), torch.arange(5), torch.tensor([0, 5]).int()).shape == (5, 1, 16)


def test_budget_without_matplotlib_says_so(config, capsys, monkeypatch, tmp_path):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else real(name))
    code, out = run(capsys, "--config", config, "--plot", tmp_path / "a.png")
    assert code == 5 and "needs matplotlib" in out.err and out.out == ""


def test_budget_of_totals_that_no_memory_meets():
    with pytest.raises(ValueError, match=r"rho 0.75: .* of which the memory's projections take .*; no rho works with this shape"):
        ek.budget(total=100, active=50)
    with pytest.raises(ValueError, match="row ids are int32"):
        ek.budget(total=1e15, active=1e14)


def test_budget_finds_the_nearest_rho_among_many_experts():
    """Without a walk over them, in digits that give it, and where one expert is smaller than the memory's projections."""
    with pytest.raises(ValueError, match=r"nearest rho that works: 0\.9965\d*, \d+ experts"):
        ek.budget(total=1e14, active=1e12, experts=10**9, rho=0.5)
    with pytest.raises(ValueError, match="nearest rho that works: 0.9984, 4992 experts"):
        ek.budget(total=26.7e9, active=3.8e9, experts=5000, rho=0.99999)
    assert ek.budget(total=26.7e9, active=3.8e9, experts=5000, rho=0.9984).chosen.routed_experts == 4992


def test_budget_counts_a_tied_head_as_a_product():
    tied, untied = (model_of_config(QWEN3_30B_CONFIG | {"tie_word_embeddings": is_tied}) for is_tied in (True, False))
    assert untied.active - tied.active == 151936 * 2048 and untied.active - untied.lookups == tied.active - tied.lookups


@pytest.mark.parametrize(("change", "layers", "shared"), [
    ({"model_type": "llama4_text", "interleave_moe_layer_step": 2}, 24, 768), ({"moe_layers": [1, 3, 99]}, 2, 0),
    ({"expert_layer_period": 4, "expert_layer_offset": 1}, 12, 0), ({"num_dense_layers": 2, "num_shared_experts": 1}, 46, 768),
    ({"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 45}, 45, 0), ({"first_k_dense_replace": 3, "mlp_only_layers": []}, 45, 0),
    ({"shared_intermediate_size": 40}, 48, 40)], ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_budget_reads_the_expert_layers_of_other_families(change, layers, shared):
    model = model_of_config(QWEN3_30B_CONFIG | change, 60e9, 4e9)
    assert model.inputs["MoE layers"].value == layers and model.shared_width == shared
    assert model.expert_parameters == layers * 3 * 2048 * 768


def test_budget_takes_no_dense_width_for_that_of_an_expert():
    with pytest.raises(ValueError, match="has no field moe_intermediate_size"):
        model_of_config({name: v for name, v in V3_CONFIG.items() if name != "moe_intermediate_size"})
    assert model_of_config(MIXTRAL_CONFIG | {"quantization_config": {"quant_method": "mxfp4"}}).weight_bytes == 4.25 / 8


def test_budget_writes_over_nothing_that_it_reads(config, capsys, tmp_path):
    before = config.read_text()
    for extra in (["--json", config], ["--json", tmp_path / "spec.json", "--write", tmp_path],
                  ["--json", tmp_path / "a.png", "--plot", tmp_path / "a.png"]):
        code, out = run(capsys, "--config", config, *extra)
        assert code == 2 and "expected another" in out.err and out.err.count("\n") == 1
    assert config.read_text() == before


def test_budget_shows_layers_and_row_format_as_they_are(config):
    inputs = ek.budget(config, rho=0.75, layers=(5,), row_format="f16").inputs
    assert inputs["memory: layers"].as_json()["value"] == "5" and inputs["memory: row format"].text == "f16"


def test_budget_leaves_matplotlib_alone_unless_asked(config, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(capsys, "--config", config)[0] == 0
