# What can be done from a fresh clone on Debian with git, make and Python 3.11, as root or as a user who has sudo.

PYTHON ?= python3
VENV ?= .venv
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
UNITDIR ?= /etc/systemd/system
DESTDIR ?=
SOAK ?= 50

# Debian packages that the tests use, beyond what every Debian has.
TEST_PACKAGES = bindfs btrfs-progs e2fsprogs erofs-utils inotify-tools libcap2-bin mount rsync squashfs-tools systemd systemd-container util-linux xfsprogs

# mkfs and losetup are not on the path of every user.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

# Root's work is done through $(AS_ROOT); who is neither root nor has sudo is told so and nothing is begun.
ROOT_MEANS := $(if $(filter 0,$(shell id -u)),env,$(if $(shell command -v sudo),sudo env))
# Root leaves no compiled files behind in a checkout that is somebody else's.
AS_ROOT = $(ROOT_MEANS) PATH="$$PATH" PYTHONDONTWRITEBYTECODE=1

define INSTALL_PACKAGES
	@missing=; for package in $(1); do \
	    dpkg-query --show --showformat='$${db:Status-Abbrev}' $$package 2>/dev/null | grep -q '^ii' \
	        || missing="$$missing $$package"; \
	done; \
	test -z "$$missing" || { \
	    command -v apt-get >/dev/null || { echo "make: no apt-get here, install by hand:$$missing" >&2; exit 1; }; \
	    test -n "$(ROOT_MEANS)" || { echo "make: needs root to install$$missing: run it as root" >&2; exit 1; }; \
	    $(AS_ROOT) apt-get update -qq && \
	    $(AS_ROOT) DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	}
endef

.DEFAULT_GOAL := help
.PHONY: help demo test soak bench run lint root packages bench-packages venv venv-dev python python3-venv install uninstall clean

help:
	@echo "make demo       watchd heals an embedded overlay before your eyes, in a mount namespace of its own"
	@echo "make test       installs what the tests need and runs them all"
	@echo "make soak       the tests that crash, damage and hammer at random, for $(SOAK) times as long"
	@echo "make bench      watchd beside its baselines: a table, and bench.json"
	@echo "make run        the daemon on this host, in the foreground"
	@echo "make lint       ruff, mypy, the import contract"
	@echo "make install    to $(PREFIX), with the systemd unit; make uninstall takes it away again"

demo: root venv
	@$(AS_ROOT) $(VENV)/bin/python -m demo

test: root packages venv-dev
	$(AS_ROOT) WATCHD_REQUIRE=all $(VENV)/bin/python -m pytest

soak: root packages venv-dev
	$(AS_ROOT) WATCHD_REQUIRE=all WATCHD_SOAK=$(SOAK) $(VENV)/bin/python -m pytest --timeout 0 tests

bench: root packages venv-dev
	-@$(MAKE) --no-print-directory bench-packages
	@$(AS_ROOT) $(VENV)/bin/python -m tests.bench

run: root venv
	@$(AS_ROOT) $(VENV)/bin/watchd run

lint: venv-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy examples
	$(VENV)/bin/lint-imports

root:
	@test -n "$(ROOT_MEANS)" || { \
	    echo "make $(MAKECMDGOALS): needs root and there is no sudo here: run it as root" >&2; exit 1; }

packages:
	$(call INSTALL_PACKAGES,$(TEST_PACKAGES))

# What watchd is measured beside; where it is not to be had the benchmarks say so.
bench-packages:
	$(call INSTALL_PACKAGES,watchman)

# --- virtual environments, made anew when pyproject.toml changes ---

# pyinotify is published as source only: without --use-pep517 an old pip would build it in a way that is going away.
INSTALL = install --quiet --disable-pip-version-check --use-pep517

venv: $(VENV)/.stamp
venv-dev: $(VENV)/.stamp-dev

$(VENV)/.stamp: pyproject.toml | python
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip $(INSTALL) --editable .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp
	$(VENV)/bin/python -m pip $(INSTALL) --editable '.[dev]'
	@touch $@

# Debian's python3 has no ensurepip, which venv needs, until python3-venv is installed.
python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	    || { echo "make: $(PYTHON) is not Python 3.11, 3.12 or 3.13: name one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory python3-venv
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	    || { echo "make: $(PYTHON) has no ensurepip: install its venv package or name another with PYTHON=" >&2; exit 1; }

python3-venv:
	$(call INSTALL_PACKAGES,python3-venv)

# --- on this host, or staged below DESTDIR ---

LIBRARY = $(DESTDIR)$(PREFIX)/lib/watchd

# Built from a copy, so that nothing of the checkout's own build gets into it and root leaves nothing there.
install: root python
	@$(AS_ROOT) $(PYTHON) -m venv $(LIBRARY)
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && cp -R pyproject.toml README.md LICENSE watchd "$$copy" && \
	    $(AS_ROOT) $(LIBRARY)/bin/python -m pip $(INSTALL) --upgrade "$$copy"
	@printf '#!%s\nfrom watchd.cli import main\n\nmain()\n' $(PREFIX)/lib/watchd/bin/python \
	    | $(AS_ROOT) tee $(LIBRARY)/bin/watchd >/dev/null
	@$(AS_ROOT) install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(UNITDIR) $(DESTDIR)$(SYSCONFDIR)/watchd/conf.d
	@$(AS_ROOT) ln -sfn ../lib/watchd/bin/watchd $(DESTDIR)$(PREFIX)/bin/watchd
	@sed 's|@BINDIR@|$(PREFIX)/bin|' systemd/watchd.service \
	    | $(AS_ROOT) tee $(DESTDIR)$(UNITDIR)/watchd.service >/dev/null
	@if test -e $(DESTDIR)$(SYSCONFDIR)/watchd/watchd.yaml; \
	    then echo "kept $(DESTDIR)$(SYSCONFDIR)/watchd/watchd.yaml as it is"; \
	    else $(AS_ROOT) install -m 0644 config/watchd.yaml $(DESTDIR)$(SYSCONFDIR)/watchd/watchd.yaml; fi
	$(RELOAD_SYSTEMD)
	@echo "installed $(DESTDIR)$(PREFIX)/bin/watchd; start it with: systemctl enable --now watchd"

uninstall: root
	@test -n "$(DESTDIR)" || ! test -d /run/systemd/system || $(AS_ROOT) systemctl disable --now --quiet watchd || true
	@$(AS_ROOT) rm -rf $(LIBRARY)
	@$(AS_ROOT) rm -f $(DESTDIR)$(PREFIX)/bin/watchd $(DESTDIR)$(UNITDIR)/watchd.service
	$(RELOAD_SYSTEMD)
	@echo "uninstalled; the configuration in $(DESTDIR)$(SYSCONFDIR)/watchd and the state in /var/lib/watchd are kept"

define RELOAD_SYSTEMD
@test -n "$(DESTDIR)" || ! test -d /run/systemd/system || $(AS_ROOT) systemctl daemon-reload
endef

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
