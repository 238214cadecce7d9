# The commands of everyday work, from an environment that has the checkout: pip install -e ".[test,docs]"
.PHONY: check test demo docs links lock

check: ## linters and types, as CI runs them
	ruff check .
	ruff format --check .
	rm -rf build/typed && pip install --quiet --no-deps --target build/typed . && mypy build/typed/vispruner

test: ## the quick ones: some architectures stand for all
	pytest -m "not slow"

demo: ## the newcomer's path, without network
	vispruner demo

docs: ## the documentation, no warning allowed
	mkdocs build --strict --site-dir build/site

links: ## every link of every page, those to other sites, too (`make links SKIP=--check-links-ignore=https?://` without)
	pytest -n 0 --noconftest --check-links $(SKIP) $$(git ls-files '*.md')

lock: ## write down the newest versions that fit: of the package, its tests and its documentation, for every platform
	uv pip compile pyproject.toml --extra test --extra docs --universal --constraint .ci/constraints.txt --upgrade --quiet \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" --output-file requirements-lock.txt
