"""Adapters: trainable modules attached to a frozen backbone, whose tensors are grouped by layer."""

from droppeft.models.quantization import silence_bitsandbytes

silence_bitsandbytes()  # every module here imports peft, which imports bitsandbytes
