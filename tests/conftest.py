"""Shared set-up: everything runs offline, from a fixed seed, and on one thread for each of pytest's processes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors, and processes that would wait for each other's threads

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed_and_clean_compiler() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
