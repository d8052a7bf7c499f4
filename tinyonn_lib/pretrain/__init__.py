"""How a small language model is grown: architectures, losses, optimisers, tokenizers and the recipe (phase 01)."""
