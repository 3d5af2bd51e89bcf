"""What every test shares: the repository's root on the path, one thread, and Hugging Face libraries that stay silent and offline."""
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

# Real preference files and GPT-2's own BPE stay out of the repository by rule, so a clone may lack them. What is tested with them is tested on made data too.
SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared data folder is not here")

torch.set_num_threads(1)             # tensors here are tiny, and sums come out in the same order on every machine


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; left out unless asked for with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [i for i in items if i.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if i not in slow]
