"""Names that a command line may use, known without torch: the commands read their arguments before they import it."""
BACKENDS = ("reference", "cpu", "cuda", "triton")
PRESETS = ("deepseek_v41", "demo_v1", "qwen4_ple", "longcat")  # class methods of EngramSpec
# of the planner
PLACEMENTS = ("device", "device_cache", "uva", "staged", "file", "remote")
REMOTE_ENGINES = ("rdma", "ray", "mooncake-tcp")  # that bring rows from other machines
GPUS = ("h100", "h800", "h200", "a100")
KINDS = ("prose", "code", "non-English")  # of text
PHASES = ("prefill", "decode")
PAPER_ROWS = ("paper_4b", "paper_8b")  # of Table 4 of arXiv 2601.07372
