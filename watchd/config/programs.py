"""The programs that the configuration names."""

from __future__ import annotations

import shutil

from watchd.config.schema import Config
from watchd.config.tree import shown

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where they are looked for, whatever the environment."""


def missing_programs(config: Config) -> list[str]:
    """A sentence for each that cannot be run, as far as can be told now; looks at the filesystems they lie on."""
    return [
        f"mounts[{index}].after: {shown(rule.after[0])} is no program that can be run; install it or correct its name"
        for index, rule in enumerate(config.mounts)
        if rule.after and shutil.which(rule.after[0], path=PATH) is None
    ]
