"""What is trained: PEFT modules attached to a frozen backbone, addressed by layer."""

from droppeft.models.quantization import hush

hush()  # peft, which every module here needs, imports bitsandbytes where it is installed
