"""Write MPNet with half of the weights of its linear layers set to zero: each matrix's smallest.

    python -m benchmarks.dropout_compressed.prune FOLDER

Magnitude pruning without training afterwards (Han et al., arXiv:1506.02626), by
`torch.nn.utils.prune`. FOLDER is a model folder of transformers. Its file is as large as before:
what a zero saves depends on the hardware.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.utils import prune
from transformers import AutoModel, AutoTokenizer

from droppeft.models.packaged import mpnet_folder

FRACTION = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    source = mpnet_folder()
    model = AutoModel.from_pretrained(source)
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            prune.l1_unstructured(module, "weight", FRACTION)
            prune.remove(module, "weight")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


if __name__ == "__main__":
    main()
