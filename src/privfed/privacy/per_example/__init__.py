"""Per-example gradients for any model and tuning: exact, clipped one by one, summed without being stored.

``PerExampleModel`` is what clients use; ``plan`` says which way each trained tensor's gradient is had.
"""

from privfed.privacy.per_example.clipping import Clipped, clipped_sum
from privfed.privacy.per_example.engine import PerExampleModel, flat_gradients

__all__ = ["Clipped", "PerExampleModel", "clipped_sum", "flat_gradients"]
