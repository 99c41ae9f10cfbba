"""Tiny models run on one thread: several that wait for each other make a greedy loop fifty times slower."""

import torch

torch.set_num_threads(1)
