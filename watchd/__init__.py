"""watchd keeps overlayfs mounts true while their lower layers change."""

__version__ = "0.1.0"
