# Developers and CI use these targets. tools/install installs tools into .tools on first use.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The results are where the README says, regardless of the user's environment.
export CARGO_TARGET_DIR := $(CURDIR)/target
export PATH := $(CURDIR)/.tools/bin:$(PATH)

# Builds are reproducible on every machine: artifacts contain no path of the build machine.
anywhere := --remap-path-prefix=$(CURDIR)=. --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=cargo
export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS := $(anywhere)
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_RUSTFLAGS := $(anywhere)
# musl's headers are not needed: the only C code (ring) uses nothing that differs in the system's headers.
export CC_x86_64_unknown_linux_musl := gcc
export CFLAGS_x86_64_unknown_linux_musl := -U_FORTIFY_SOURCE

module := target/wasm32-unknown-unknown/wasm/tideshift_filter.wasm
FUZZ_SECONDS ?= 10
render := cargo run -q -p tideshift --bin tideshift -- render
heading = @printf '\n\033[1m== %s\033[0m\n'

## Use it

.PHONY: build
build: module ## Build target/tideshift.wasm and target/release/tideshift
	$(heading) 'Building the controller'
	cargo build --release -p tideshift --bin tideshift

.PHONY: module
module: rust
	$(heading) 'Building the module'
	cargo build --profile wasm --target wasm32-unknown-unknown -p tideshift-filter
	cmp -s $(module) target/tideshift.wasm || cp $(module) target/tideshift.wasm

.PHONY: image
image: module musl ## Build container images of the module and the controller in target/image, without a container engine
	$(heading) 'Building the controller as a static binary'
	cargo build --profile static --target x86_64-unknown-linux-musl -p tideshift --bin tideshift
	$(heading) 'Images'
	cargo run -q -p tideshift-image -- target/tideshift.wasm target/x86_64-unknown-linux-musl/static/tideshift target/image

.PHONY: demo
demo: build envoy ## Show live how traffic shifts, and how a bad release is rolled back (KEEP=1 leaves it running)
	$(heading) 'Demo'
	cargo run --release -p tideshift-tests --no-default-features --bin demo

## Measure it

.PHONY: bench
bench: build envoy ## Measure the filter's cost on a real Envoy (QUICK=1, ROUNDS=N, ONLY='weights|Lua', MODULE=FILE)
	$(heading) 'Building what it is compared with'
	cargo build --profile wasm --target wasm32-wasip1 -p tideshift-bench-noop -p tideshift-bench-raw
	cargo build --release -p tideshift-tests --no-default-features --bin bench
	$(heading) 'Bench'
	$(if $(MODULE),TIDESHIFT_WASM=$(MODULE)) target/release/bench

.PHONY: bench-safety
bench-safety: build envoy ## Measure how long a broken target keeps its share, and the effect of one hostile client (RUNS=20, SECONDS=60, CASES=hangs)
	$(heading) 'Time to safety'
	cargo run --release -p tideshift-tests --no-default-features --features streams --bin safety

.PHONY: bench-fleet
bench-fleet: build ## Measure one controller with thousands of proxies (PROXIES=10000, CHANGES=20)
	$(heading) 'One controller, many proxies'
	cargo run --release -p tideshift-tests --no-default-features --bin fleet

.PHONY: bench-controller
bench-controller: build ## Measure one controller's cost with many documents and reports (BASE=FILE, ROUNDS=3, ONLY=report, STARTS=100000)
	$(heading) 'What a controller costs'
	cargo run --release -p tideshift-tests --no-default-features --bin costs
	$(heading) 'The same in a cluster'
	cargo run --release -p tideshift-tests --no-default-features --features kubernetes --bin cluster

.PHONY: verdict-tables
verdict-tables: rust ## Compute the tables of docs/verdict-proof.md: error rate and speed of the verdict (30 minutes)
	$(heading) 'The verdict in tables'
	VERDICT_TABLES=1 cargo test --release -p tideshift-core --test clients --test verdict table -- --nocapture --test-threads=1

## Check it

.PHONY: test
test: lint deny unit wasm-test fuzz e2e ## Run all checks below, as CI does
	$(heading) 'All tests passed'

.PHONY: lint
lint: rust ## Check formatting, links in documents, and clippy
	$(heading) 'Links'
	tools/links
	$(heading) 'Formatting'
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	$(heading) 'Clippy'
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p tideshift-filter --target wasm32-unknown-unknown -- -D warnings
	cargo clippy -p tideshift-bench-noop -p tideshift-bench-raw --target wasm32-wasip1 -- -D warnings
	cargo clippy --manifest-path fuzz/Cargo.toml --no-default-features --lib --test corpus -- -D warnings

.PHONY: unit
unit: rust ## Run unit and property tests
	$(heading) 'Unit and property tests'
	cargo test --workspace --exclude tideshift-tests
	$(heading) 'The verdict on thousands of simulated rollouts'
	cargo test --release -p tideshift-core --test verdict --test clients

.PHONY: wasm-test
wasm-test: rust node wasm-bindgen ## Run core's tests compiled to wasm32
	$(heading) 'The same tests of core on wasm32'
	CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUNNER=wasm-bindgen-test-runner \
		cargo test -p tideshift-core --target wasm32-unknown-unknown

.PHONY: fuzz
fuzz: rust cargo-fuzz ## Fuzz documents, requests and reports, for FUZZ_SECONDS=10
	$(heading) 'Fuzzing'
	tools/fuzz $(FUZZ_SECONDS)

.PHONY: soak
soak: build ## Send ten million requests through the module in a wasm host: its memory must not grow (REQUESTS=N; 20 minutes)
	$(heading) 'The module for a long time'
	REQUESTS=$(or $(REQUESTS),10000000) cargo test --release -p tideshift-tests --test module soak:: -- --nocapture

.PHONY: e2e
e2e: build envoy chromium axe schemas ## Test the module in a wasm host, then real Envoy, controller and backends (ARGS='--test e2e controller_rollout' for some)
	$(heading) 'The module in a wasm host, and end to end on a real Envoy'
	RUST_LIB_BACKTRACE=0 cargo test -p tideshift-tests --no-fail-fast $(ARGS) # transient errors need no backtraces

.PHONY: test-kubernetes
test-kubernetes: build envoy ## Test the controller in the cluster of KUBECONFIG, which may be a bare control plane
	$(heading) 'In the cluster of KUBECONFIG'
	cargo test -p tideshift-tests --test kubernetes --no-run
	@skip() { printf '\n\033[1;33m== SKIPPED, nothing was tested in a real cluster: %s\033[0m\n' "$$*"; exit 0; }; \
	test -n "$${KUBECONFIG:-}" || skip 'KUBECONFIG is not set'; \
	export TIDESHIFT_TEST_KUBECONFIG=$$(realpath "$$KUBECONFIG"); \
	cargo test -q -p tideshift-tests --test kubernetes -- --ignored --exact cluster::the_cluster_answers || \
		skip "the cluster of $$KUBECONFIG does not answer"; \
	RUST_LIB_BACKTRACE=0 cargo test -p tideshift-tests --test kubernetes cluster:: -- --nocapture

.PHONY: simulation
simulation: rust ## Redraw the picture in docs/simulate.md
	$(heading) 'A simulation of the example'
	cargo run -q -p tideshift --bin tideshift -- simulate -f envoy-configs/checkout.yaml \
		--scenario envoy-configs/scenario.yaml --svg docs/images/simulation.svg

.PHONY: pictures
pictures: build chromium ## Redraw the web page's pictures in docs/images (install the font Inter for the best result)
	$(heading) 'Pictures of the web page'
	cargo test -p tideshift-tests --test page -- --ignored --exact chromium::pictures

.PHONY: generate
generate: manifests simulation ## Regenerate every generated file that is committed
	$(heading) 'OpenAPI, the document reference, golden decisions'
	UPDATE_GOLDEN=1 cargo test -q -p tideshift --lib is_what_the_code_says
	UPDATE_GOLDEN=1 cargo test -q -p tideshift-core --test golden
	$(heading) 'Examples'
	$(render) envoy -f envoy-configs/checkout.yaml > target/rendered && cp target/rendered envoy-configs/envoy.yaml
	cd envoy-configs/kubernetes; render() { $(render) "$${@:2}" -f payment.yaml > $(CURDIR)/target/rendered && cp $(CURDIR)/target/rendered "$$1"; }; \
	render istio-gateway.yaml istio; render istio-sidecar.yaml istio --for sidecar; render istio-waypoint.yaml istio --for waypoint; \
	render envoy-gateway.yaml envoy-gateway; render httproute.yaml httproute

.PHONY: manifests
manifests: rust ## Regenerate the plain Kubernetes manifests and the chart's table of values
	$(heading) 'Manifests'
	cargo run -q -p tideshift-tests --no-default-features --features kubernetes --bin manifests

.PHONY: deny
deny: cargo-deny ## Check licences, bans, sources and known vulnerabilities of the dependencies
	$(heading) 'Licences, bans and sources of the dependencies'
	cargo deny check licenses bans sources
	$(heading) 'Known vulnerabilities of the dependencies'
	tools/advisories

## Get what it needs

.PHONY: tools
tools: rust musl envoy node wasm-bindgen chromium axe schemas cargo-deny cargo-fuzz ## Install everything below

.PHONY: rust musl envoy node wasm-bindgen chromium axe schemas cargo-deny cargo-fuzz
rust: ## Rust's wasm targets, clippy and rustfmt, by rustup
musl: ## Rust's target for static binaries, by rustup
envoy: ## Envoy, into .tools/bin
node: ## Node, if it is missing
wasm-bindgen: ## wasm-bindgen's test runner
chromium: ## Chromium and its driver, by apt-get, if they are missing
axe: ## axe-core, which checks the web page's accessibility
schemas: ## The schemas of the objects that users apply in a cluster
cargo-deny: ## cargo-deny
cargo-fuzz: ## cargo-fuzz
rust musl envoy node wasm-bindgen chromium axe schemas cargo-deny cargo-fuzz:
	@tools/install $@

.PHONY: clean
clean: ## Remove build results
	cargo clean

.PHONY: distclean
distclean: clean ## Remove build results and tools
	rm -rf .tools

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^## / { printf "\n%s\n", substr($$0, 4) } /^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' \
		$(firstword $(MAKEFILE_LIST))
