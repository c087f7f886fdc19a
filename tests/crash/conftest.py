"""The daemon is killed on real mounts, as the kernel tests have them."""

from tests.kernel.conftest import daemon, own_mount_namespace, sandbox, workspace

__all__ = ["daemon", "own_mount_namespace", "sandbox", "workspace"]
