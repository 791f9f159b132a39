"""Imported once by the fork server, so that each run starts in milliseconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.utils.tensorboard  # noqa: E402, F401

import train.main  # noqa: E402, F401
import train.pretrain  # noqa: E402, F401
