"""``python -m lora_fused``: the command ``lora-fused``."""

from lora_fused.cli import main

main()
