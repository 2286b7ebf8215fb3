"""The placement planner: where a memory's table should live, what it costs there, and what would change that."""
from engram_kernels.plan.hardware import Hardware, assumed_hardware
from engram_kernels.plan.model import Flip, Outcome, Plan, make_plan
from engram_kernels.plan.quantity import Provenance, Quantity, Surface
from engram_kernels.plan.repeats import Repeats, published_repeats
from engram_kernels.plan.workload import Workload, table_bytes

__all__ = ["Flip", "Hardware", "Outcome", "Plan", "Provenance", "Quantity", "Repeats", "Surface", "Workload", "assumed_hardware",
           "make_plan", "published_repeats", "table_bytes"]
