"""mmft: fine-tune pretrained vision-language models with reinforcement learning from learned rewards."""

__version__ = "0.1.0"
