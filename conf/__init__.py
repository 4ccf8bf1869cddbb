"""The configuration tree, shipped as the package ``gatl.conf``."""
