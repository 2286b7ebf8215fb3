"""What `engram-kernels demo` runs."""
