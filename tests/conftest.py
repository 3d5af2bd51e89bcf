"""What every test shares: the repository's root on the path, one thread, and Hugging Face libraries that stay silent and offline."""
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

torch.set_num_threads(1)             # tensors here are tiny, and sums come out in the same order on every machine
