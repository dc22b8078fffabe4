# What a developer or a CI machine asks of this tree. deploy/make.sh does it; `make` alone prints this list.

RUN := ./deploy/make.sh

# Each target is whole in itself, and two at a time would only wait for each other's build.
.NOTPARALLEL:
.PHONY: help setup guest build test check demo demo-cluster chaos bench clean

help:
	@echo 'make demo    kill the host of a guest and show that the guest goes on; writes target/demo/summary.json'
	@echo '             (RUNS=n SEED=n SECONDS=n are passed on)'
	@echo 'make demo-cluster'
	@echo '             kill, move and cut off the nodes of a cluster and show that it heals; writes'
	@echo '             target/demo-cluster/summary.json (SECONDS=n between two steps is passed on)'
	@echo 'make chaos   let nodes, etcd and networks fail under a protected guest; writes target/chaos/summary.json'
	@echo '             (RUNS=n SEED=n SECONDS=n are passed on; needs root and /dev/kvm)'
	@echo 'make test    all tests; those that boot a guest need /dev/kvm'
	@echo 'make check   formatting, clippy, licences and sources of dependencies'
	@echo '             (COLO_ADVISORIES=1: security advisories too, from the network)'
	@echo 'make bench   benchmarks; needs an otherwise idle machine'
	@echo 'make setup   install or check what building needs'
	@echo 'make guest   prepare the guest kernels, initramfs and payloads'
	@echo 'make build   build everything'
	@echo 'make clean   remove what was built, but no guest image'
	@echo
	@echo 'COLO_CACHE          where guest images, tools and builds are kept'
	@echo 'CARGO_TARGET_DIR    where cargo builds (default: target/ in that cache)'

setup guest build test check bench clean:
	@$(RUN) $@

demo-cluster:
	@$(RUN) $@ $(if $(SECONDS),--seconds '$(SECONDS)')

demo chaos:
	@$(RUN) $@ $(if $(RUNS),--runs '$(RUNS)') $(if $(SEED),--seed '$(SEED)') $(if $(SECONDS),--seconds '$(SECONDS)')
