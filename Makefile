# Every target works from a clean clone: `setup` makes .venv first, and costs nothing afterwards.
PYTHON_IN_VENV := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup serve serve-npu-sim demo quick test test-rest test-release test-all accuracy certify matrix topologies lint bench picture bench-host-lane lost-peers soak contracts lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup:  ## create .venv: SGLang on CPU, this package, test tools
	@scripts/setup.sh

serve: setup  ## serve a tiny Qwen3-VL, tp 2 pp 2, until Ctrl-C (ARGS="--pp 4" for options)
	@$(PYTHON_IN_VENV) scripts/serve.py $(ARGS)

serve-npu-sim: setup  ## the same on the simulated Ascend: SGLang's NPU path, the real torch_npu, HCCL
	@$(PYTHON_IN_VENV) scripts/serve.py --device npu-sim $(ARGS)

demo: setup  ## serve, ask which digit a picture shows, end; fails when the answer is wrong
	@$(PYTHON_IN_VENV) scripts/serve.py --demo $(ARGS)

quick: setup  ## quick tests that need neither a server nor the simulated Ascend, a few minutes; no lint
	@$(PYTHON_IN_VENV) -m scripts.suite quick $(ARGS)

test: lint  ## lint, then the usual path, on real servers too (ARGS="-k NAME" for a part)
	@$(PYTHON_IN_VENV) -m scripts.environment.install --suite
	@$(PYTHON_IN_VENV) -m scripts.suite test $(ARGS)

test-rest: setup  ## what `make test` leaves out: further features, layouts, releases, settings and loads
	@$(PYTHON_IN_VENV) -m scripts.environment.install --suite
	@$(PYTHON_IN_VENV) -m scripts.suite test-rest $(ARGS)

test-release: setup  ## before a release: planted faults that our gates must notice, four stages, second variants
	@$(PYTHON_IN_VENV) -m scripts.environment.install --suite
	@$(PYTHON_IN_VENV) -m scripts.suite test-release $(ARGS)

test-all: test test-rest test-release  ## the whole suite, one after the other

accuracy: setup  ## lmms_eval and a random model, unpatched against patched (ARGS="--quick", "--self-test")
	@$(PYTHON_IN_VENV) scripts/accuracy.py $(ARGS)

certify: setup  ## python -m sglang_npu_pp certify, on CPU and on the simulated Ascend (ARGS="--devices cpu")
	@$(PYTHON_IN_VENV) scripts/certify.py $(ARGS)

matrix: setup  ## twelve SGLang releases x four layouts, two hours (ARGS="--releases 0.5.15 --layouts tp1-pp2")
	@$(PYTHON_IN_VENV) scripts/matrix.py $(ARGS)

topologies: setup  ## the command lines published for Ascend, scaled down, simulated Ascend, an hour (ARGS="--stages 2 --lines glm5_1")
	@$(PYTHON_IN_VENV) scripts/topologies.py $(ARGS)

lint: setup  ## ruff and mypy
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy

bench: setup  ## upstream against this package over an emulated link (ARGS="--quick --json FILE --figure FILE")
	@$(PYTHON_IN_VENV) -m scripts.bench $(ARGS)

picture: setup  ## record upstream's pipeline and this one, draw docs/pipelines.svg (ARGS="--delay MS --pad MS")
	@$(PYTHON_IN_VENV) -m scripts.bench.pipelines $(ARGS)

bench-host-lane: setup  ## round trips on the host lane beside bare pyzmq, on loopback
	@$(PYTHON_IN_VENV) scripts/bench_host_lane.py $(ARGS)

soak: setup  ## half an hour of random load, delays and unauthenticated clients at pp 4 (ARGS="--minutes 5 --json FILE")
	@$(PYTHON_IN_VENV) -m scripts.soak $(ARGS)

lost-peers: setup  ## kill and stop stages, cut the link: an hour, needs root (ARGS="--pp 2 --upstream --json FILE")
	@$(PYTHON_IN_VENV) -m scripts.lost_peers $(ARGS)

lock: setup  ## the locks of requirements/ from its short files; what newer versions there are (ARGS="--upgrade")
	@$(PYTHON_IN_VENV) -m scripts.environment.lock $(ARGS)

contracts: setup  ## SGLang functions that the patches rely on: which changed in which release
	@$(PYTHON_IN_VENV) scripts/fingerprint.py $(ARGS)

clean:  ## remove what was built here, .venv included
	rm -rf .venv .run .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
