"""engram_kernels: conditional memory for language models. Public names only; everything else is private."""
__all__: list[str] = []
