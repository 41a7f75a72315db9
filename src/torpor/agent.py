"""`torpor.agent` where Torpor itself is installed; a sandbox shows `torpor.sdk.agent` under this name."""

from torpor.sdk.agent import *  # noqa: F403
from torpor.sdk.agent import __all__ as __all__  # noqa: PLC0414
