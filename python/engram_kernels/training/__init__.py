"""Training of tables: the optimizer of rows, and rows that are prefetched and updated behind the compute."""
