"""Generation as a service: vLLM engines in Ray actors, weights by version, tokens with their log-probabilities."""
