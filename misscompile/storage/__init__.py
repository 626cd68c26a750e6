"""Adapters on disk: the folder that PEFT reads too, and files that appear together or not at all."""
