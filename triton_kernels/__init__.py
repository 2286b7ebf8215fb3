"""Triton kernels: one file per op, with its kernels and a launch function of the signature of reference/<op>.py plus `out`.

Nothing here imports Triton before an op runs on it; `engram_kernels.backends` says whether it can.
"""
if __name__ == "triton_kernels":  # another project's name (triton-lang/triton python/triton_kernels)
    raise ImportError("import engram_kernels.triton_kernels instead; `triton_kernels` is the name of another project")
