"""Named shapes. A benchmark names one of these; a number without its workload is not written anywhere."""
import dataclasses

from engram_kernels.spec import EngramSpec


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape of the main job: a spec and how many tokens a step has."""

    name: str
    spec: EngramSpec
    num_tokens: int


DEEPSEEK_V41_DECODE = Workload("deepseek_v41_decode", EngramSpec.deepseek_v41(), 1)
DEEPSEEK_V41_BATCH = Workload("deepseek_v41_batch", EngramSpec.deepseek_v41(), 256)
DEEPSEEK_V41_PREFILL = Workload("deepseek_v41_prefill", EngramSpec.deepseek_v41(), 65_536)
