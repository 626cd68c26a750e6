"""MiSS fine-tuning as a compiler: adapters are rewritten into the graph of a model, not wrapped around its modules."""

from misscompile.errors import (
    ArgumentError,
    CaptureError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    MergeError,
    MissError,
    MissWarning,
    NoMatchError,
    StateError,
    UnknownAdapterError,
    UnsupportedModuleError,
)
from misscompile.hosts.capture import capture
from misscompile.rules.config import MissConfig
from misscompile.verbs.adapt import adapt
from misscompile.verbs.checkpoint import hotswap_adapter, load_adapter, save_adapter
from misscompile.verbs.dump import dump
from misscompile.verbs.lora import LoraFidelity, save_as_lora
from misscompile.verbs.merge import merge, unmerge
from misscompile.verbs.switch import (
    active_adapters,
    adapters,
    delete_adapter,
    disable_adapter,
    print_trainable_parameters,
    set_adapter,
    trainable_parameters,
    unload,
)

__all__ = [
    "ArgumentError",
    "CaptureError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "LoraFidelity",
    "MergeError",
    "MissConfig",
    "MissError",
    "MissWarning",
    "NoMatchError",
    "StateError",
    "UnknownAdapterError",
    "UnsupportedModuleError",
    "active_adapters",
    "adapt",
    "adapters",
    "capture",
    "delete_adapter",
    "disable_adapter",
    "dump",
    "hotswap_adapter",
    "load_adapter",
    "merge",
    "print_trainable_parameters",
    "save_adapter",
    "save_as_lora",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
]

__version__ = "0.1.0"
