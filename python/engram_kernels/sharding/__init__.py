"""Rows of one table that lie on several ranks of torch.distributed."""
