"""What can be known of a run from the shape of its model alone, before data and weights are read.

The model is made without values, tuned as the real one will be, and its tensors are shared out as the rule says. What
does not fit is refused with the sentence that the real set-up would give. Where a tuning computes with weights, which
are not there, the real set-up has to tell.
"""

from __future__ import annotations

import warnings

from privfed.errors import PrivfedError
from privfed.federation.meter import check_meter
from privfed.federation.setup import sharing_of
from privfed.models.loading import load_skeleton
from privfed.run_config import RunConfig
from privfed.tuning import TUNINGS, TunedModel


def check_structure(config: RunConfig) -> bool:
    """Find out whether tuning, rule and personal parts fit the model; return whether all of it could be.

    Raises:
        ModelError: If the tuning or the rule does not fit the model.
        ConfigError: If ``server.personal`` or ``server.meter`` does not fit what is trained.
    """
    tuned = _tuned(config)
    if tuned is None:
        return False
    if getattr(config.tuning, "name", "") == "head":  # a head alone has other names, and never a pair
        return True
    sharing = sharing_of(config, tuned.model, tuned.head, config.client, config.server)
    if config.server.meter:
        check_meter(sharing)
    return True


def _tuned(config: RunConfig) -> TunedModel | None:
    """Return the tuned model without values; None where its tuning reads values."""
    loaded = load_skeleton(config.model)
    plugin = TUNINGS.get(str(getattr(config.tuning, "name", "")))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plugin.apply(loaded, config.tuning, 0)
    except PrivfedError as error:
        if isinstance(error.__cause__, RuntimeError):  # torch: there are no values
            return None
        raise
    except Exception:  # noqa: BLE001  (whatever a library says of a model without values, the real one may do)
        return None
