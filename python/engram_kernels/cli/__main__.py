"""`python -m engram_kernels.cli`."""
import sys

from engram_kernels.cli.main import main

sys.exit(main())
