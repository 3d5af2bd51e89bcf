"""What every test shares: the root on the path, one thread, Hugging Face libraries offline."""

import logging
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                  TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

# Real preference files and GPT-2's own BPE stay out of the repository, so a clone may lack them.
# What is tested with them is tested on made data too.
SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared data folder is not here")

torch.set_num_threads(1)          # tensors are tiny, and sums come out in the same order everywhere
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Files of rows and pairs, and two small models in float64: see lab.py."""
    from lab import make_lab
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def models(lab):
    """Policy and reference."""
    from lab import load
    return load(lab, "moved"), load(lab, "ref")
