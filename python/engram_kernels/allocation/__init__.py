"""How a model's sparse capacity is split between routed experts and a memory, at the same number of parameters."""
