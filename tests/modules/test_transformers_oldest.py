"""The oldest transformers that has Qwen4Exp runs what tests/modules/test_transformers_*.py ask of the newest."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = "5.16.0"
ROOT = Path(__file__).resolve().parents[2]
FILES = ("tests/modules/test_transformers_qwen4.py", "tests/modules/test_transformers_decoder.py")
TESTS = "logits or leave or published or operations or rejected or save_pretrained or graph or crop"


@pytest.mark.slow
def test_the_oldest_release_with_qwen4_exp(tmp_path):
    """In a folder in front of the installed one, with the hub package that it wants; torch and numpy stay as they are."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path)]
    subprocess.run([*pip, "huggingface-hub>=1.5,<2"], check=True)
    subprocess.run([*pip, "--no-deps", f"transformers=={OLDEST}"], check=True)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    shown = subprocess.run([sys.executable, "-c", "import transformers; print(transformers.__version__)"], env=env, check=True,
                           capture_output=True, text=True).stdout
    assert shown.strip().endswith(OLDEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", TESTS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
