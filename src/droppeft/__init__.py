"""Federated fine-tuning of language models with stochastic transformer layer dropout."""

__version__ = "0.1.0"
