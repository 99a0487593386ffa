"""Language models in JAX: recurrent and Transformer models, trained and compared by perplexity under one protocol."""
