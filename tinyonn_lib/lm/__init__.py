"""Models and texts: loading, finding FFNs, corpora, tokenizers, pretraining."""
