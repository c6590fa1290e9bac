"""Trainers. Importing this silences what TRL 1.12 says of itself: users can change none of it."""

import os
import warnings

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# TRL reads and sets transformers' old names of activation checkpointing.
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
