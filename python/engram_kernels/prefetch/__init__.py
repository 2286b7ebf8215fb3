"""Prefetching: how rows travel while the model computes."""
