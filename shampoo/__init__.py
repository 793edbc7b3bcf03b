"""AdamW-style Shampoo for torch."""

from .optimizer import AdamWShampoo

__all__ = ["AdamWShampoo"]
