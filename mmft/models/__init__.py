import mmft.models.lite_tower  # noqa: F401  # makes its type known to transformers wherever models are loaded
