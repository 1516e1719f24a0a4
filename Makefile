# Everything is made below target/; `make clean` takes it away. Each target installs what it needs by image/setup.sh.

CARGO ?= cargo
DESTDIR ?=
PREFIX ?= /usr
BOOT = target/boot/kcrypt-discovery-challenger

.PHONY: all setup programs demo test test-all fuzz check bench install clean

all: programs

setup:
	@image/setup.sh

programs: setup
	@image/programs.sh

# The main job, told as it happens.
demo: programs
	@image/build.sh >/dev/null
	@$(CARGO) run --quiet --release -p latchkey-tests --bin demo

# Unit tests, exchanges on swtpm, power cuts, the boots that every change must survive, and libFuzzer for two seconds on
# each parser.
test: programs
	@image/build.sh >/dev/null
	$(CARGO) test --workspace
	@fuzz/run.sh 2

# And the long matrix of boots.
test-all: programs
	@image/build.sh >/dev/null
	$(CARGO) test --workspace --features latchkey-tests/all

# libFuzzer on each parser of foreign bytes, or on TARGETS="…", for this many seconds each.
FUZZ_SECONDS ?= 300
fuzz: setup
	@fuzz/run.sh $(FUZZ_SECONDS) $(TARGETS)

# What a change must not break besides its tests: form, lints, licences, and which crate may know which.
check: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --features latchkey-tests/all -- -D warnings
	@tests/floors.sh
	@tests/deny.sh

bench:
	@image/setup.sh bench
	@image/programs.sh
	@image/build.sh >/dev/null
	@$(CARGO) run --quiet --release -p latchkey-tests --bin bench

install:
	@for program in $(BOOT) target/release/latchkey target/release/latchkey-kms; do \
		[ -x $$program ] || { echo "make install: $$program is not built; run make programs as an ordinary user first" >&2; exit 1; }; \
	done
	install -D -m 755 $(BOOT) $(DESTDIR)$(PREFIX)/bin/kcrypt-discovery-challenger
	install -D -m 755 target/release/latchkey $(DESTDIR)$(PREFIX)/bin/latchkey
	install -D -m 755 target/release/latchkey-kms $(DESTDIR)$(PREFIX)/bin/latchkey-kms
	install -d $(DESTDIR)/system/discovery
	ln -sfn ../..$(PREFIX)/bin/kcrypt-discovery-challenger $(DESTDIR)/system/discovery/kcrypt-discovery-challenger
	install -d $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/50latchkey
	install -m 755 dracut/50latchkey/*.sh $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/50latchkey/
	install -m 644 $(filter-out %.sh,$(wildcard dracut/50latchkey/*)) $(DESTDIR)$(PREFIX)/lib/dracut/modules.d/50latchkey/
	install -D -m 644 systemd/latchkey.service $(DESTDIR)$(PREFIX)/lib/systemd/system/latchkey.service
	install -D -m 644 systemd/latchkey.ikto.conf $(DESTDIR)$(PREFIX)/share/latchkey/mesh/ikto.conf
	install -D -m 644 systemd/latchkey-kms.service $(DESTDIR)$(PREFIX)/lib/systemd/system/latchkey-kms.service
	install -D -m 644 systemd/latchkey-kms.sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/latchkey-kms.conf
	install -D -m 644 systemd/latchkey-kms.tls.conf $(DESTDIR)$(PREFIX)/share/latchkey/kms/tls.conf
	install -d $(DESTDIR)$(PREFIX)/share/latchkey/grub
	install -m 644 grub/* $(DESTDIR)$(PREFIX)/share/latchkey/grub/
	install -d $(DESTDIR)$(PREFIX)/share/man/man8
	install -m 644 man/* $(DESTDIR)$(PREFIX)/share/man/man8/
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	install -d $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	install -m 644 completions/bash/* $(DESTDIR)$(PREFIX)/share/bash-completion/completions/
	install -m 644 completions/zsh/* $(DESTDIR)$(PREFIX)/share/zsh/site-functions/
	install -m 644 completions/fish/* $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/
	install -D -m 644 LICENSE $(DESTDIR)$(PREFIX)/share/doc/latchkey/copyright

clean:
	rm -rf target
