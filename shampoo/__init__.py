"""AdamW-style Shampoo for torch."""

from .optimizer import AdamWShampoo

__all__ = ["AdamWShampoo"]
__version__ = "0.2.0.dev0"
