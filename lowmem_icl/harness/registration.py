"""The name of the model in lm-evaluation-harness. torch imports this module in every program where the
package is installed, so it imports nothing by itself.
"""

import sys

MODEL_NAME = "lowmem-icl"
TARGET = "lowmem_icl.harness.model:StreamedLM"


def register() -> None:
    """Make the harness know the model; its class is imported when it is asked for."""
    # The harness fills its registry only while that is empty, so its own models come first.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=TARGET)


def register_beside_torch() -> None:
    """Do so where the harness is running; called by torch at the end of its import.

    The harness's releases up to 0.4.13 read no entry points for models, and import torch before they look for
    a model; later ones read `lm_eval.models` (pyproject.toml), and this can go.
    """
    if "lm_eval" in sys.modules:
        register()
