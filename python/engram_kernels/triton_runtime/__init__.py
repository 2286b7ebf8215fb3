"""Host code of the Triton backend: dispatch, launches, launch parameters and their tuning, warmup."""
