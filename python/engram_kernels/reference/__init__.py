"""Plain PyTorch versions of every op: short, obvious, differentiable. They import torch and nothing of ours."""
