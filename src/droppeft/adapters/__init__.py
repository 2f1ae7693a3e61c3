"""What is trained: PEFT modules attached to a frozen backbone, addressed by layer."""
