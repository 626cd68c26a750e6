"""Shared set-up: everything runs offline, on two threads, and from a fixed seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed_and_clean_compiler() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
