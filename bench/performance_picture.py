"""docs/performance.png: one figure of the measured runs in bench/results. Needs matplotlib.

    python bench/performance_picture.py

On the left, the share of a device copy's rate that the CUDA kernels reach on an H200, by the number of tokens. On the right, the
time of each op's peer over the op's own on a CPU. Every number is read from the result files; nothing is measured here.
"""
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
GPU_RUN, CPU_RUN = ROOT / "bench/results/2026-11-26_h200.md", ROOT / "bench/results/2026-11-23_epyc_2_cores.md"
# first words of a line of the GPU run -> what the figure calls it
GPU_OPS = {"gate (peer": "gate, bf16", "gather_rows, bf16 to bf16": "gather_rows, bf16",
           "gather_gate, fp8_e4m3_block32_packed": "gather_gate, fp8",
           "gather_rows, fp8_e4m3_block32_packed to bf16 |": "gather_rows, fp8"}
# (workload of the CPU run, contender, name in the figure); the fastest peer that the run has
CPU_PEERS = (("ngram_hash, deepseek_v41_prefill", "numpy (the demo's)",
              "ngram_hash, prefill\nover numpy"),
             ("short_conv, demo_v1 (4x1024, bf16), 2048 tokens", "eager torch, shifted sum",
              "short_conv, 2048 tokens\nover eager torch"),
             ("gate, 512 tokens, M 4, H 5120, bf16, one thread", "torch.compile of the reference",
              "gate, 512 tokens\nover torch.compile"),
             ("gather_rows, 262144 random rows of 256 to bf16 from 8388608 rows", "torch.index_select(out=)",
              "gather_rows, 262144 rows\nover index_select"),
             ("gather_rows backward, 262144 positions of 256 bf16 into 1M rows", "torch embedding_dense_backward (sums in bf16)",
              "gather_rows backward\nover embedding"),
             ("gather_rows, deepseek_v41_decode, 24 rows of 256 to bf16, call included", "torch.index_select(out=)",
              "gather_rows, 24 rows\nover index_select"))


def gpu_shares() -> dict[str, list[tuple[int, float]]]:
    """(tokens, percent of the copy's rate) of each op of the GPU run."""
    lines = GPU_RUN.read_text().splitlines()
    found = {}
    for begin, name in GPU_OPS.items():
        cells = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {begin}")]
        found[name] = [(int(row[1]), float(row[4].rstrip("%"))) for row in cells]
    return found


def cpu_ratios() -> list[tuple[str, float]]:
    """(name, the peer's time over ours) of each pair of the CPU run, from the medians."""
    medians = {}
    for line in CPU_RUN.read_text().splitlines():
        if (match := re.match(r"\| (.+?) \| (.+?) \| ([\d.]+) us \|", line)) is not None:
            workload, contender, median = match.groups()
            medians[workload, "ours" if contender.startswith("**") else contender] = float(median)
    return [(name, medians[workload, peer] / medians[workload, "ours"]) for workload, peer, name in CPU_PEERS]


def main() -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5), width_ratios=(1.1, 1))
    for (name, points), marker in zip(gpu_shares().items(), "osD^", strict=True):
        left.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name)
    left.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="tokens in the batch", ylabel="% of the copy's rate", ylim=(0, 108),
             title="NVIDIA H200: share of a device copy (4246 GB/s)")
    left.set_xticks([1, 16, 128, 512, 4096, 16384], ["1", "16", "128", "512", "4096", "16384"])
    left.minorticks_off()
    left.legend(frameon=False, loc="lower right", fontsize=8, handlelength=1.4)
    ratios = cpu_ratios()[::-1]
    right.barh([name for name, _ in ratios], [ratio - 1 for _, ratio in ratios], left=1,
               color=["tab:blue" if ratio >= 1 else "tab:red" for _, ratio in ratios])
    for place, (_, ratio) in enumerate(ratios):
        right.annotate(f"{ratio:.2f}x", (max(ratio, 1), place), (4, 0), textcoords="offset points", va="center")
    right.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    right.set(xscale="log", xlim=(0.15, 40), title="EPYC, 2 cores: the peer's time over ours")
    right.set_xticks([0.25, 1, 4, 16], ["0.25", "1", "4", "16"])
    right.minorticks_off()
    right.tick_params(axis="y", labelsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/performance.png", dpi=130)


if __name__ == "__main__":
    main()
