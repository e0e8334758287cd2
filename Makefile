# `make help` lists what there is. Nothing is built here: the scripts in hack/
# do the work and can be run by themselves.
.DEFAULT_GOAL := help
SHELL := /bin/bash
# rustup and Go's own archive install to these; a login shell would know them.
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/go/bin
BINARY := target/release/gantry

.PHONY: help
help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target text; do printf '  make %-12s %s\n' "$$target" "$$text"; done

.PHONY: setup
setup: ## install what building needs (Debian, as root)
	@hack/setup

.PHONY: build
build: setup ## the release binary, target/release/gantry
	cargo build --release --locked --config hack/release.toml
	@hack/install-binary $(BINARY)

.PHONY: cross
cross: ## the release binary for arm64, built on another machine
	@hack/cross

.PHONY: image
image: ## the container image of the Dockerfile, without a Docker engine (root): build/image
	@hack/image

.PHONY: sbom
sbom: setup ## what the program is made of, as CycloneDX: build/gantry.cdx.json
	@hack/setup --image
	@hack/sbom build/gantry.cdx.json

.PHONY: demo
demo: ## a control plane, a Gantry node and the tutorial, told step by step
	@hack/demo

.PHONY: test
test: ## all suites, as .ci/run does
	@hack/test

.PHONY: lint
lint: ## formatting, clippy, cargo-deny, go vet, shellcheck
	@hack/test lint

.PHONY: unit
unit: ## unit and property tests
	@hack/test unit

.PHONY: cross-test
cross-test: ## the unit tests of the arm64 program, under emulation
	@hack/test cross

.PHONY: integration
integration: ## tests of single parts on the real kernel (root)
	@hack/test integration

.PHONY: e2e
e2e: ## scenarios on a real control plane (root)
	@hack/test e2e

.PHONY: guest
guest: ## the smoke scenarios on a node with pure cgroup v2 (root)
	@hack/test guest

.PHONY: conformance
conformance: build ## upstream's own tests on Gantry nodes: SUITE=node|node-serial|conformance, FOCUS=..., SKIP=...
	@hack/conformance

.PHONY: bench
bench: build ## what Gantry costs beside kubelet, containerd and runc (docs/benchmarks.md)
	@hack/bench

.PHONY: down
down: ## remove all test clusters of this directory
	@hack/cluster down --all

.PHONY: clean
clean: down ## remove everything that was built, and all test clusters
	rm -rf build target
