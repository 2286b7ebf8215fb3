"""The table of `make cuda-report`: what every CUDA kernel moves and executes, simulated, and the time that an H100 cannot beat.

    python tests/sim/cuda_sim/report.py [--page docs/cuda.md]

Bytes and instructions come from executing the PTX (sm_90) on the simulator, registers and shared memory from ptxas. Nothing
here is a measured time: the bound is the larger of bytes over the memory rate and instructions over the issue rate of the data
sheet.
"""
import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

from cuda_sim import Launch, build
from cuda_sim.report_cases import CASES

# H100 SXM data sheet (assumed): HBM3 bytes per second; 132 multiprocessors, 4 schedulers each, one warp instruction per cycle
MEMORY_BYTES_PER_S = 3.35e12
WARP_INSTRUCTIONS_PER_S = 132 * 4 * 1.755e9
HEADLINE = ("Simulated, not measured: PTX for sm_90 executed instruction by instruction, registers and spills from ptxas. The "
            "bound is the larger of memory and issue time by the H100 data sheet (3.35 TB/s; 132 multiprocessors at 1.755 GHz), "
            "for this shape at any number of tokens that fills the GPU. Sectors are under the ideal where lanes read the same "
            "bytes.")


@dataclass(frozen=True)
class Case:
    """One line of the table.

    op: "ngram_hash" and so on; shape: what was run.
    run: gives the launches.
    least_bytes: what any kernel must move; units: outputs of `unit`, over which instructions are counted.
    """
    op: str
    shape: str
    run: Callable[[], list[Launch]]
    least_bytes: int
    units: int
    unit: str


def global_totals(launches: list[Launch]) -> tuple[int, int, int]:
    """(bytes moved between kernel and memory, sectors, ideal sectors) over the launches.

    A buffer's bytes are its distinct ones in each launch: what is read twice within one comes from the cache.
    """
    moved = sectors = ideal = 0
    for launch in launches:
        for buffer in launch.result.buffers.values():
            # the distinct bytes are counted on from one launch to the next; what this one left alone is not its traffic
            moved += buffer.get("unique_bytes_read", 0) if buffer.get("load_bytes") else 0
            moved += buffer.get("unique_bytes_written", 0) if buffer.get("store_bytes") else 0
        for line in launch.result.lines:
            if line["space"] == "global":
                sectors, ideal = sectors + line["sectors"], ideal + line["ideal"]
    return moved, sectors, ideal


def row(case: Case) -> str:
    launches = case.run()
    moved, sectors, ideal = global_totals(launches)
    usages = [build().usage(_file_of(launch))[launch.kernel] for launch in launches]
    instructions = sum(launch.result.thread_instructions for launch in launches)
    warps = sum(launch.result.warp_instructions for launch in launches)
    memory_s, issue_s = moved / MEMORY_BYTES_PER_S, warps / WARP_INSTRUCTIONS_PER_S
    bound = "memory" if memory_s >= issue_s else "issue"
    per_unit = max(memory_s, issue_s) / case.units * 1e9
    shared = max(launch.shared_bytes + usage.static_shared_bytes for launch, usage in zip(launches, usages, strict=True))
    return (f"| `{case.op}` | {case.shape} | {moved / case.least_bytes:.3f} | {sectors / ideal:.2f} | "
            f"{instructions / case.units:.1f} / {case.unit} | {max(u.registers for u in usages)} | "
            f"{sum(u.spill_bytes for u in usages)} | {shared} | {per_unit:.3g} ns / {case.unit}, {bound} |")


def _file_of(launch: Launch) -> str:
    return next(op for op in build().ops if launch.kernel in build().usage(op))


def table() -> str:
    lines = [HEADLINE, "", "| kernel | shape | bytes over minimum | sectors over ideal | PTX thread instructions | registers | "
             "spilled bytes | shared bytes | H100 bound |", "|---|---|---|---|---|---|---|---|---|"]
    for make in CASES:
        case = Case(*make())
        print(f"{case.op}: {case.shape}", file=sys.stderr, flush=True)
        lines.append(row(case))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="write the table between its cuda markers")
    args = parser.parse_args()
    text = table()
    print(text)
    if args.page:
        before, _, rest = args.page.read_text().partition("<!-- cuda -->\n")
        _, marker, after = rest.partition("<!-- /cuda -->")
        if not marker:
            raise SystemExit(f"{args.page} has no <!-- cuda --> ... <!-- /cuda --> block")
        args.page.write_text(f"{before}<!-- cuda -->\n{text}{marker}{after}")


if __name__ == "__main__":
    main()
