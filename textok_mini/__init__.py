"""textok_mini: TexTok, "Language-Guided Image Tokenization for Generation" (CVPR 2025), to learn, check and rerun.

from textok_mini import TexTok, load_config, load_data
"""

import importlib
import warnings

__version__ = "0.1.0"

# Where each public name lives. Imported on first use, so that a command can refuse a wrong setting before torch
# has been loaded.
PUBLIC = {
    "TexTok": "tokenizer",
    "Discriminator": "discriminator",
    "DiT": "dit",
    "FrozenTextEncoder": "text",
    "TextTokens": "text",
    "load_data": "data",
    "load_config": "settings",
}
__all__ = list(PUBLIC)

# Widgets would make a notebook's saved state invalid on GitHub; plain progress bars need no such advice.
warnings.filterwarnings("ignore", message="IProgress not found")


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(importlib.import_module(f"textok_mini.{PUBLIC[name]}"), name)
    raise AttributeError(f"module 'textok_mini' has no attribute {name!r}")
