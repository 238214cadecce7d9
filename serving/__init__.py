"""Serving engines: what makes them serve pruned models with prompts that are really shorter."""
