"""Backbones: loading, precision, quantisation, offloading."""
