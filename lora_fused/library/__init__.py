"""The adapter library: adapters of one base with vectors to find them by. See library.py."""

from lora_fused.library.entries import Entry, Space
from lora_fused.library.fingerprint import fingerprint
from lora_fused.library.library import AdapterLibrary
from lora_fused.library.reader import Hits
from lora_fused.library.upkeep import Fault, Stats

__all__ = ["AdapterLibrary", "Entry", "Fault", "Hits", "Space", "Stats", "fingerprint"]
