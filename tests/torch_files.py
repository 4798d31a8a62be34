"""PyTorch's files, for tests of its state dicts."""

import io

import torch


def through_a_file(state_dict):
    """Return what PyTorch reads from a file that it has written."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
