"""Backbones as ordered layers that can be cut at any layer and frozen up to any layer."""
