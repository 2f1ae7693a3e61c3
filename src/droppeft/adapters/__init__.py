"""Adapters: trainable modules attached to a frozen backbone, whose tensors are grouped by layer."""

from droppeft.extras import silence_bitsandbytes

silence_bitsandbytes()  # modules here import peft, which imports bitsandbytes
